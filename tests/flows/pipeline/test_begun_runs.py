"""Runs of the toy pipeline while files come: which of them each run reads."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.manifest import ArtifactRef
from draftsmith.artifacts.store import Store
from draftsmith.artifacts.tracking import Tracking
from draftsmith.flows.cli import main
from draftsmith.flows.pipeline import node as nodes
from draftsmith.flows.pipeline import run
from draftsmith.flows.pipeline.begun import notes
from draftsmith.flows.pipeline.cancellation import Cancellation
from draftsmith.flows.pipeline.graph import Node, PlannedNode
from draftsmith.flows.pipeline.node import Made, Workshop, make
from draftsmith.flows.pipeline.part import Part
from draftsmith.flows.pipeline.process import StageOutcome, StageRequest
from tests.flows.pipeline.toy import TOY, ToyConfig, write_config
from tests.testbed.context import RecordingContext


class Home:
    """A home, and a folder of numbers that `left` adds, where more come. Tasks and stages run in this process."""

    def __init__(self, folder: Path) -> None:
        self.path, self.numbers, self.allow = folder / "home", folder / "numbers", folder / "allow"
        self.numbers.mkdir()
        self.come("a")
        left, total = {"addends": str(self.numbers / "*")}, {"allow": str(self.allow)}
        self.file = write_config(folder / "toy.yaml", left=left, total=total)
        self.config = ToyConfig.model_validate({"name": "toy", "left": left, "total": total})
        self.lost: list[str] = []  # stages of which one attempt is lost when it has saved something
        self.saved: list[Path] = []  # what an attempt found
        self.goes: Path | None = None  # while the first stage works

    def come(self, name: str) -> None:
        (self.numbers / name).write_text("1000")

    def run(self, *force: str, until: str = "") -> int:
        """What the last node is."""
        part = Part.of((), [until] if until else ())
        made, _ = run._run_once(self.config, TOY, force, part, Cancellation())
        return self.number(made[until or "total"]["path"])

    def number(self, path: str | Path) -> int:
        return json.loads((Path(path) / "numbers.json").read_text())[0]

    def planned(self, *force: str, deployed: bool = False) -> PlannedNode:
        """The node `left`, as a run would make it."""
        planned = Part().plan(self.config, Store(self.path), TOY, force, deployed=deployed)
        return next(item for item in planned if item.node.name == "left")

    def reads(self, *force: str, deployed: bool = False) -> str:
        return "".join(path.name for path in self.planned(*force, deployed=deployed).node.config.external_files())

    def task(self, workshop: Workshop, node: Node, inputs: Mapping[str, ArtifactRef], *_: Any, force: bool) -> Any:
        """As a Prefect task does: what was lost is tried again."""
        made: Made | None = None
        while made is None:
            try:
                made = make(workshop, node, inputs, force=force)
            except RetryableError:
                self.come("meanwhile")
        return made, None

    def stage(self, request: StageRequest, **_: Any) -> StageOutcome:
        if self.goes is not None:
            self.goes.unlink()
            self.goes = None
        stage = importlib.import_module(request.module).STAGE
        inputs = {name: Path(path) for name, path in request.inputs.items()}
        context = RecordingContext(Path(request.out), Path(request.work), inputs, request.seed)
        self.saved += context.work.glob("saved")
        if request.stage in self.lost:
            self.lost.remove(request.stage)
            (context.work / "saved").touch()
            raise RetryableError("the bucket does not answer")
        stage.run(context, stage.config.model_validate(request.config).reading(request.files or ()))
        return StageOutcome(0.1, dict(context.summaries))


@pytest.fixture
def home(tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    made = Home(tmp_path)
    monkeypatch.setattr(run, "run_node", made.task)
    monkeypatch.setattr(nodes, "run_stage", made.stage)
    return made


def test_what_was_made_before_a_failure_is_reused_though_files_came(home: Home) -> None:
    with pytest.raises(DraftsmithError, match="allow is missing"):
        home.run()
    home.come("b")
    assert home.reads() == "a" and home.reads("left") == "ab"
    home.allow.touch()
    assert home.run() == 30 + 1000
    assert home.reads() == "ab", "it has come to its end"


def test_what_was_made_is_reused_after_a_failure_before_it(home: Home) -> None:
    with pytest.raises(DraftsmithError, match="allow is missing"):
        home.run()
    home.come("b")
    known = home.config
    home.config = known.model_copy(update={"target": known.target.model_copy(update={"fail_at": 1})})
    with pytest.raises(DraftsmithError, match="number 1 is bad"):
        home.run()
    home.config = known
    home.allow.touch()
    assert home.run() == 30 + 1000


def test_a_file_that_goes_while_the_run_makes_what_is_before_it_is_told(home: Home) -> None:
    home.come("b")
    home.allow.touch()
    home.goes = home.numbers / "b"
    with pytest.raises(DraftsmithError, match=r"left: \S+/numbers/b \(of 1\) was there when the run began and is gone"):
        home.run()
    assert home.run() == 30 + 1000


def test_a_run_that_fails_for_its_files_reads_more_when_they_have_come(home: Home) -> None:
    enough = home.allow.with_name("enough")
    home.config = home.config.model_copy(update={"left": home.config.left.model_copy(update={"allow": enough})})
    with pytest.raises(DraftsmithError, match="enough is missing"):
        home.run()
    home.come("b")
    enough.touch()
    assert home.run(until="left") == 10 + 2000


def test_a_retry_goes_on_where_the_attempt_before_was_lost(home: Home) -> None:
    home.allow.touch()
    home.lost = ["combine"]
    assert home.run(until="left") == 10 + 1000
    assert len(home.saved) == 1 and (home.numbers / "meanwhile").is_file()


def test_what_is_forced_and_what_is_behind_it_reads_what_is_there(home: Home) -> None:
    home.allow.touch()
    home.run()
    home.come("b")
    assert home.reads("target") == home.reads("left") == "ab"
    assert home.reads("total") == home.reads("right") == "a"
    assert home.reads("total", deployed=True) == "ab", "every run of the deployment forces it"


@pytest.mark.parametrize("deployment", [None, uuid4()], ids=["by hand", "of a deployment"])
def test_a_run_knows_whether_a_deployment_runs_it(deployment: UUID | None) -> None:
    flow_run = FlowRun(flow_id=uuid4(), deployment_id=deployment)
    with FlowRunContext.model_construct(flow_run=flow_run):
        assert run.deployed() == (deployment is not None)
    assert not run.deployed()


def test_a_run_that_forces_the_same_every_night_reads_more_every_night(home: Home) -> None:
    home.allow.touch()
    for night, name in enumerate("bcd"):
        home.come(name)
        assert home.run("target") == 30 + 1000 * (night + 2)


def test_plans_say_which_files_are_left_for_the_next_run(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DraftsmithError):
        home.run()
    home.come("b")
    said = (
        "left: goes on with the files that the last run began with (1); those that came since (1) are for the next one "
        "(`--force left` reads them now)"
    )
    assert home.planned().left_over == said
    for command in (["run", "--plan"], ["status"], ["check"], ["stage", "right"], ["why"]):
        capsys.readouterr()
        main([*command, str(home.file), *(["left"] if command == ["why"] else [])], TOY)
        assert said in " ".join(capsys.readouterr().out.split()), command


def test_a_stage_reads_what_the_one_before_it_was_made_of(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    def stage(*words: str) -> Path:
        capsys.readouterr()
        assert main(["stage", words[0], str(home.file), *words[1:]], TOY) == 0
        return Path(capsys.readouterr().out.split()[-1])

    home.allow.touch()
    home.run()
    home.come("b")
    assert home.number(stage("left")) == 10 + 1000
    assert home.number(stage("left", "--force")) == 10 + 2000
    home.come("c")
    assert home.number(stage("total")) == 30 + 2000
    assert home.reads() == "abc"


def test_a_stage_that_fails_alone_for_its_files_reads_more_when_they_have_come(home: Home) -> None:
    words = [str(home.file), "--set", f"left.allow={home.path / 'enough'}"]
    assert main(["stage", "target", *words], TOY) == 0
    assert main(["stage", "left", *words], TOY) == 2
    home.come("b")
    (home.path / "enough").touch()
    assert main(["stage", "left", *words], TOY) == 0
    assert len(notes("toy")["left"].files) == 2
