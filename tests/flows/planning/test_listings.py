"""The files of a run are listed once. The listing is reused until that run has ended."""

from __future__ import annotations

import importlib
import json
import os
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec
import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.cli.main import main
from draftsmith.flows.execution import make
from draftsmith.flows.execution.make import RunContext
from draftsmith.flows.execution.process import run_stage
from draftsmith.flows.orchestration import run
from draftsmith.flows.orchestration.flow_run import deployed
from draftsmith.flows.planning.external_files import external_digests
from draftsmith.flows.planning.graph import Selection
from draftsmith.flows.planning.listings import note_listings, read_listings
from draftsmith.flows.planning.plan import Build, Status, plan
from draftsmith.stages.data import listing, time_window
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.data.prompts.stage import PromptsConfig
from draftsmith.stages.runtime.stage import StageRequest
from tests.flows.toy import TOY, ToyConfig, write_config
from tests.flows.toy_flow import make_and_conclude
from tests.testbed.context import RecordingContext


def logs(path: Path | str, **more: Any) -> LogsConfig:
    return LogsConfig(paths=[str(path)], temperature=0, **more)


def prompts(path: Path | str, **more: Any) -> PromptsConfig:
    source = {"kind": "jsonl", "path": str(path), **more}
    return PromptsConfig.model_validate({"sources": [source], "train": 0, "heldout": 1})


class Home:
    """A home, and a folder of files with numbers that the node `left` adds. Stages run in this process."""

    def __init__(self, folder: Path) -> None:
        self.path, self.numbers, self.allow = folder / "home", folder / "numbers", folder / "allow"
        self.numbers.mkdir()
        self.come("a")
        left, total = {"addends": str(self.numbers / "*")}, {"allow": str(self.allow)}
        self.file = str(write_config(folder / "toy.yaml", left=left, total=total))
        self.config = ToyConfig.model_validate({"name": "toy", "left": left, "total": total})
        self.lost = 0  # attempts at the next stage that fail after they saved something
        self.saved: list[Path] = []  # files that attempts have resumed from

    def come(self, name: str) -> None:
        (self.numbers / name).write_text("1000")

    def run(self, *force: str, until: str = "") -> int:
        """Run the pipeline and return the sum of the last node."""
        selection = Selection.from_options(force, (), [until] if until else (), deployed=deployed())
        begun = run.Run(TOY, self.config, selection)
        with begun._recorded():
            make_and_conclude(begun)
        return self.number(begun.made[until or "total"].path)

    def number(self, path: str | Path) -> int:
        return int(json.loads((Path(path) / "numbers.json").read_text())[0])

    def planned(self, *force: str, deployed: bool = False) -> dict[str, Build]:
        selection = Selection.from_options(force, (), (), deployed=deployed)
        return {item.node.name: item for item in plan(self.config, Store(self.path / "store"), TOY, selection)}

    def left_out(self, *force: str, deployed: bool = False) -> int:
        return self.planned(*force, deployed=deployed)["left"].newer_files

    def task(self, context: RunContext, build: Build, *_: Any, force: bool) -> Any:
        """Retry a retryable error, as a Prefect task does."""
        while True:
            try:
                return make.make(context, build, force=force), None
            except RetryableError:
                self.come("meanwhile")

    def stage(self, request: StageRequest, *_: Any, **_options: Any) -> dict[str, float]:
        stage = importlib.import_module(request.module).STAGE
        context = RecordingContext(request.out, request.work, request.inputs, request.seed)
        self.saved += context.work.glob("saved")
        if request.stage == "combine" and self.lost:
            self.lost -= 1
            (context.work / "saved").touch()
            raise RetryableError("the bucket does not answer")
        config = stage.config.model_validate(request.config)
        stage.run(context, config if request.listing is None else config.with_pinned_files(request.listing))
        return dict(context.summaries)


@pytest.fixture
def home(tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> Home:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    made = Home(tmp_path)
    monkeypatch.setattr(run, "run_node", made.task)
    monkeypatch.setattr(make, "run_stage", made.stage)
    return made


def test_a_continued_run_reuses_its_listing_and_the_next_run_reads_new_files(home: Home) -> None:
    with pytest.raises(DraftsmithError):
        home.run()
    home.come("b")
    assert home.left_out() == 1 and home.planned()["left"].status is Status.HIT
    home.allow.touch()
    assert home.run() == 30 + 1000
    assert home.left_out() == 0, "it has ended"
    assert home.run() == 30 + 2000
    assert home.planned()["left"].status is home.planned()["total"].status is Status.HIT, "nothing is new"


@pytest.mark.parametrize("what", ["a file goes", "other config", "forced", "next week"])
def test_a_listing_is_reused_if_its_files_exist_and_the_config_is_the_same(what: str, home: Home) -> None:
    home.come("b")
    with pytest.raises(DraftsmithError):
        home.run()
    home.come("c")
    if what == "a file goes":
        (home.numbers / "b").unlink()
    elif what == "other config":
        left = home.config.left.model_copy(update={"addends": str(home.numbers / "[a-z]")})
        home.config = home.config.model_copy(update={"left": left})
    elif what == "next week":
        (note,) = (home.path / "listings").iterdir()
        os.utime(note, (0, 0))
    home.allow.touch()
    assert home.run(*(["left"] if what == "forced" else [])) == 30 + (2000 if what == "a file goes" else 3000)


def test_after_bad_input_the_files_are_listed_again(home: Home) -> None:
    enough = home.allow.with_name("enough")
    home.config = home.config.model_copy(update={"left": home.config.left.model_copy(update={"allow": enough})})
    with pytest.raises(DraftsmithError):
        home.run()
    home.come("b")
    enough.touch()
    assert home.run(until="left") == 10 + 2000


def test_a_retry_resumes_although_new_files_arrived(home: Home) -> None:
    home.allow.touch()
    home.lost = 1
    assert home.run(until="left") == 10 + 1000
    assert len(home.saved) == 1 and (home.numbers / "meanwhile").is_file()


@pytest.mark.parametrize("how", ["grows", "goes before"])
def test_a_listed_file_that_changes_or_disappears_fails_the_stage(
    how: str, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    home.come("b")

    def change(request: StageRequest, *more: Any, **options: Any) -> dict[str, float]:
        outcome = home.stage(request, *more, **options)
        if request.stage == ("collect" if how == "goes before" else "combine"):
            (home.numbers / "b").write_text("2000") if how == "grows" else (home.numbers / "b").unlink()
        return outcome

    with monkeypatch.context() as patch:
        patch.setattr(make, "run_stage", change)
        with pytest.raises(DraftsmithError, match=r"left: \S+/numbers/b"):
            home.run(until="left")
    assert home.run(until="left") == 10 + (3000 if how == "grows" else 1000)


def test_a_forced_node_reads_no_new_files_except_in_a_deployment(home: Home) -> None:
    home.allow.touch()
    home.run()
    home.come("b")
    assert home.left_out("total") == 1 and home.left_out("left") == 0
    assert home.left_out("total", deployed=True) == 0, "every run of the deployment forces it"
    assert home.planned("total")["left"].status is Status.HIT
    assert home.run("target") == 30 + 1000
    flow_run = FlowRun(flow_id=uuid4(), deployment_id=uuid4())
    with FlowRunContext.model_construct(flow_run=flow_run):
        assert home.run("target") == 30 + 2000


def test_a_single_stage_reuses_the_last_listing(
    home: Home, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make, "run_stage", run_stage)  # in processes

    def stage(*words: str) -> Path:
        capsys.readouterr()
        assert main(["stage", words[0], home.file, *words[1:]], TOY) == 0
        return Path(capsys.readouterr().out.split()[-1])

    stage("target")
    assert home.number(stage("left")) == 10 + 1000
    home.come("b")
    assert home.number(stage("left")) == 10 + 1000
    stage("right")
    assert home.number(stage("left", "--force")) == 10 + 2000
    home.allow.touch()
    assert home.number(stage("total")) == 30 + 2000
    home.come("c")
    assert home.left_out() == 0, "it began no run"
    assert home.left_out("total") == 1


def test_only_folders_patterns_addresses_and_relative_windows_are_listed(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("{}\n")
    system = fsspec.filesystem("memory")
    system.pipe_file("/one/a.jsonl", b"{}\n")
    assert prompts(file).list_files() is logs(file, since="2026-03-02").list_files() is None
    for path in (tmp_path, f"{tmp_path}/*", "memory://one/a.jsonl"):
        assert prompts(path).list_files() is not None and logs(path).list_files() is not None
    assert (listed := prompts(file, since="7d").list_files()) is not None and set(listed.since) == {"7d"}
    system.rm("/one", recursive=True)


def test_a_window_starts_relative_to_the_time_of_the_listing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Clock(datetime):
        at = datetime(2026, 3, 2, 23, 0, tzinfo=UTC)

        @classmethod
        def now(cls, _zone: Any = None) -> Any:
            return cls.at

    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "a.jsonl").write_text("{}\n")
    for module in (time_window, listing):
        monkeypatch.setattr(module, "datetime", Clock)
    config = logs(tmp_path / "logs", since="12h")
    then, began = config.list_files(), config.since_time
    assert then is not None
    key = external_digests(config.with_pinned_files(then))
    Clock.at = datetime(2026, 3, 3, 8, 0, tzinfo=UTC)
    now = config.list_files()
    assert now is not None and external_digests(config.with_pinned_files(now)) != key
    assert config.since_time != began
    assert config.with_pinned_files(then).since_time == began
    source = prompts(tmp_path / "logs", since="12h").with_pinned_files(then).sources[0]
    assert getattr(source, "since_time") == began  # noqa: B009 (of one kind of source)


@pytest.mark.usefixtures("home")
def test_a_listing_names_local_files_and_files_in_buckets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system = fsspec.filesystem("memory")
    (tmp_path / "a.jsonl").write_bytes(b"{}")
    paths = (str(tmp_path / "*.jsonl"), "memory://listed/*.jsonl")
    config = LogsConfig(paths=list(paths), temperature=0)
    try:
        system.pipe_file("/listed/0.jsonl", b"{}\n")
        note_listings("run", {"logs": config.list_files()})  # type: ignore[dict-item]
        listed = read_listings("run")["logs"]
        system.pipe_file("/listed/1.jsonl", b"{}\n")
        (tmp_path / "b.jsonl").write_text("{}\n")
        assert (now := config.list_files()) is not None and len(now.files) == 4 and listed.serves(now)
        pinned = config.with_pinned_files(listed)
        assert len(pinned.files()) == 2 and pinned.external_files() == [tmp_path / "a.jsonl"]
        assert list(pinned.external_versions()) == [listed.files[-1]]
        assert pinned.model_copy(update={"rows": 3}).files() == pinned.files()
        assert pinned.model_dump() == config.model_dump() and pinned.key_material() == config.key_material()
        busy = OSError("503 Slow Down")
        monkeypatch.setattr(type(system), "glob", lambda *_, **__: (_ for _ in ()).throw(busy))
        with pytest.raises(RetryableError):
            config.list_files()
    finally:
        system.rm("/listed", recursive=True)
