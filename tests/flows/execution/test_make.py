"""An attempt: damaged inputs and changing files discard it, and `draftsmith status` shows who makes it and how far."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.store import attempt
from draftsmith.artifacts.store.attempt import Attempt
from draftsmith.artifacts.store.checksums import Checksums
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import ELSEWHERE, Artifact, sha256_file
from draftsmith.artifacts.store.mirror import STORE_VARIABLE
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.cli.main import main
from draftsmith.flows.cli.status import show_config_status
from draftsmith.flows.execution.display import Display
from draftsmith.flows.execution.make import RunContext, make, unchanged
from draftsmith.flows.execution.process import run_stage
from draftsmith.flows.planning.graph import Node
from draftsmith.flows.planning.plan import Build, Status, find, plan
from tests.flows.toy import TOY, ToyConfig, toy_nodes, write_config
from tests.flows.toy_stages.combine import CombineConfig
from tests.testbed.artifacts import committed


class Toy:
    """A home with the toy's first artifact, and the node that reads it."""

    def __init__(self, home: Path, tracking: Tracking) -> None:
        config = ToyConfig(name="t")
        self.nodes = {node.name: node for node in toy_nodes(config)}
        self.context = RunContext(home, config, Display(), tracking)
        self.target = make(self.context, self.build(self.nodes["target"], {}))
        self.numbers = self.target.path / "numbers.json"

    def left(self, config: CombineConfig | None = None) -> Node:
        node = self.nodes["left"]
        return node if config is None else replace(node, config=config)

    def build(self, node: Node, inputs: Mapping[str, Artifact] | None = None) -> Build:
        return Build.of(TOY, self.context.config, node, {"first": self.target} if inputs is None else inputs)

    def make(self, node: Node, *, force: bool = False) -> Artifact:
        return make(self.context, self.build(node), force=force)

    def found(self, node: Node) -> Artifact | None:
        return find(self.build(node), self.context.store)

    def measure(self, figures: str) -> None:
        """Build the first artifact again, with the same content and other volatile files."""
        files = {"numbers.json": self.numbers.read_text(), "metrics.jsonl": figures}
        store, key = self.context.store, self.target.key
        measured = committed(store, "collect", files, key, force=True, volatile=("metrics.jsonl",))
        assert (measured.key, measured.content_id) == (self.target.key, self.target.content_id)
        self.target = measured


@pytest.fixture
def toy(tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> Toy:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    return Toy(tmp_path / "home", tracking)


def flip(path: Path, place: int = 1, bit: int = 1) -> None:
    """Flip a bit, which keeps the size."""
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)


def meanwhile(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Call `act` while a stage's process runs."""

    def run_and_act(*arguments: Any, **keywords: Any) -> dict[str, float]:
        outcome = run_stage(*arguments, **keywords)
        act()
        return outcome

    monkeypatch.setattr("draftsmith.flows.execution.make.run_stage", run_and_act)


def test_a_flipped_bit_in_an_input_is_found_before_the_stage_starts(toy: Toy) -> None:
    flip(toy.numbers)
    with pytest.raises(DraftsmithError, match=r"left: its input first: .*numbers\.json: .*stage target CONFIG --force"):
        toy.make(toy.left())
    assert toy.found(toy.left()) is None
    flip(toy.numbers)
    assert json.loads((toy.make(toy.left()).path / "numbers.json").read_text()) == [0 + 1 + 2 + 3 + 4]


def test_an_artifact_with_a_flipped_bit_is_not_reused(toy: Toy) -> None:
    made = toy.make(toy.left())
    flip(made.path / "numbers.json")
    with pytest.raises(DraftsmithError, match=r"numbers\.json: .*--force left"):
        toy.make(toy.left())
    assert toy.make(toy.left(), force=True).content_id == made.content_id


@pytest.mark.parametrize(("how", "in_bucket"), [("flipped", True), ("gone", False)])
def test_the_output_is_discarded_if_an_input_breaks_meanwhile(
    how: str, in_bucket: bool, tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if a bucket has another copy: the stage has read the damaged one."""
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    if in_bucket:
        (tmp_path / "bucket").mkdir()
        monkeypatch.setenv(STORE_VARIABLE, f"file://{tmp_path / 'bucket'}")
    toy = Toy(tmp_path / "home", tracking)
    node, store = toy.left(), toy.context.store
    with monkeypatch.context() as patch:
        meanwhile(patch, lambda: flip(toy.numbers) if how == "flipped" else toy.numbers.unlink())
        with pytest.raises(DraftsmithError, match=r"numbers\.json") as refused:
            toy.make(node)
    assert ("--force" in str(refused.value)) is not in_bucket
    partial = store.partial_path("combine", toy.build(node).key)
    assert not [path for path in partial.rglob("*") if path.is_file() and path.name == "numbers.json"]
    assert toy.found(node) is None
    if in_bucket:
        assert json.loads((toy.make(node).path / "numbers.json").read_text()) == [0 + 1 + 2 + 3 + 4]


def test_artifacts_made_from_a_damaged_input_are_not_reused(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A disk that loses a bit leaves the time of the file: found when it is hashed again."""
    before = toy.make(replace(toy.left(), config=CombineConfig(factor=7)))
    known = Checksums(toy.context.home)
    known._file(toy.numbers).unlink(missing_ok=True)  # a week has gone by
    monkeypatch.setattr("draftsmith.artifacts.store.checksums._CLOCK_RESOLUTION_S", -1.0)
    known.sha256(toy.numbers)
    stat = toy.numbers.stat()
    flip(toy.numbers)
    os.utime(toy.numbers, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    _forge(known, toy.numbers)
    wrong = toy.make(toy.left())
    monkeypatch.setattr("draftsmith.artifacts.store.checksums.MAX_AGE_S", 0.0)
    with pytest.raises(DraftsmithError, match="has changed since it was written"):
        toy.context.store.verify_once(toy.target)
    assert f"{wrong.path} was made from {toy.numbers}, which is damaged. It is renamed" in caplog.text
    assert toy.found(toy.left()) is None
    assert before.path.exists(), "the input was intact after it was built"


def _forge(checksums: Checksums, path: Path) -> None:
    """Change the record as if only the bits of the file had changed, not its times."""
    stat, known = path.stat(), checksums.cached(path)
    assert known is not None
    checksums._remember(replace(known, mtime_ns=stat.st_mtime_ns, ctime_ns=stat.st_ctime_ns))


@pytest.mark.parametrize("when", ["before", "while the stage runs"])
def test_nothing_is_built_from_an_input_that_another_run_rebuilt(
    when: str, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_it_again() -> None:
        committed(toy.context.store, "collect", {"numbers.json": "[1000]"}, toy.target.key, force=True)

    if when == "before":
        make_it_again()
    else:
        meanwhile(monkeypatch, make_it_again)
    with pytest.raises(DraftsmithError, match=r"left: its input first .*another run"):
        toy.make(toy.left())
    assert toy.found(toy.left()) is None


def test_a_file_that_changes_while_it_is_read_fails_the_stage(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    addend = tmp_path / "addend"
    addend.write_text("5")
    node = toy.left(CombineConfig(addend=addend))
    key = toy.build(node).key

    def replace_it() -> None:
        addend.write_text("6")

    with monkeypatch.context() as patch:
        meanwhile(patch, replace_it)
        with pytest.raises(DraftsmithError, match=r"left: .*addend changed"):
            toy.make(node)
    assert toy.context.store.find("combine", key) is None
    partial = toy.context.store.partial_path("combine", key)
    assert not [each for name in ("out", "work") for each in (partial / name).rglob("*")]
    made = toy.make(node)
    assert made.key != key and json.loads((made.path / "numbers.json").read_text()) == [16]


def test_a_node_is_rebuilt_after_its_input_was_measured_again(toy: Toy) -> None:
    first = toy.make(toy.left())
    assert toy.make(toy.left()).reused
    toy.measure("anew")
    planned = {item.node.name: item.status for item in plan(toy.context.config, toy.context.store, TOY)}
    assert (planned["target"], planned["left"]) == (Status.HIT, Status.RUN)
    again = toy.make(toy.left())
    assert not again.reused and again.content_id == first.content_id
    assert toy.make(toy.left()).reused


def test_the_next_run_adds_to_an_inconclusive_measurement(tmp_path: Path, toy: Toy) -> None:
    quiet = tmp_path / "quiet"
    config = ToyConfig.model_validate({"name": "t", "target": {"inconclusive_until": str(quiet)}})
    nodes = {node.name: node for node in toy_nodes(config)}

    def statuses() -> dict[str, Status]:
        return {item.node.name: item.status for item in plan(config, toy.context.store, TOY)}

    first = make(toy.context, toy.build(nodes["target"], {}))
    left = make(toy.context, toy.build(nodes["left"], {"first": first}))
    assert not left.reused, "this run goes on with it"
    assert statuses()["target"] is Status.RUN
    again = make(toy.context, toy.build(nodes["target"], {}))
    assert not again.reused and again.content_id == first.content_id
    assert (again.path / "metrics.jsonl").read_text().count("\n") == 2 * 5, "it was given the first one"
    make(toy.context, toy.build(nodes["target"], {}), force=True)
    assert (again.path / "metrics.jsonl").read_text().count("\n") == 5, "forced, it begins anew"
    quiet.touch()
    assert not make(toy.context, toy.build(nodes["target"], {})).reused
    assert make(toy.context, toy.build(nodes["target"], {})).reused
    assert statuses()["target"] is Status.HIT


@pytest.mark.parametrize("force", [False, True])
def test_an_uncommitted_artifact_of_an_earlier_measurement_is_not_used(
    force: bool, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise DraftsmithError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_complete", full)
        with pytest.raises(DraftsmithError, match="the disk is full"):
            toy.make(toy.left(), force=force)
    toy.measure("anew")
    made = toy.make(toy.left(), force=force)
    assert not made.reused and toy.build(toy.left()).reuses(made)
    assert not list(toy.context.store.root.glob("combine/.partial-*"))


def test_files_outside_the_store_that_an_input_names_must_not_change(toy: Toy, tmp_path: Path) -> None:
    weights = tmp_path / "weights"
    weights.write_bytes(b"1234")
    files = {"numbers.json": "[1]", ELSEWHERE: json.dumps({str(weights): sha256_file(weights)})}
    toy.target = committed(toy.context.store, "collect", files, toy.target.key, force=True)
    toy.make(toy.left())
    flip(weights)
    for act in (lambda: None, weights.unlink):
        act()
        with pytest.raises(DraftsmithError, match="weights: has changed since stage collect read it"):
            toy.make(toy.left(CombineConfig(factor=3)))


def test_a_store_that_does_not_answer_discards_no_work(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    store, left = toy.context.store, toy.left()

    def away(*_: object) -> None:
        raise RetryableError("s3: does not answer")

    with store.claim("combine", "b" * 64) as claim:
        assert isinstance(claim, Attempt)
        with pytest.raises(RetryableError), unchanged(store, toy.build(left), claim):
            (claim.work / "checkpoint.pt").write_text("hours")
            monkeypatch.setattr(store, "manifest_at", away)
        assert (claim.work / "checkpoint.pt").exists()


def test_a_running_node_is_shown_with_its_process_and_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path))
    monkeypatch.setattr(attempt, "_EVERY_S", 0.0)
    config, store = ToyConfig(name="t"), Store(tmp_path / "store")
    key = plan(config, store, TOY)[0].key
    assert key is not None

    def status() -> str:
        console = Console(width=400, record=True)
        show_config_status(Display(console), config, TOY)
        return console.export_text()

    with store.claim("collect", key, run="t", node="target") as claim:
        assert isinstance(claim, Attempt)
        claim.progress(1, 5, "numbers", None)
        assert f"running: node target of t on {platform.node()} (pid {os.getpid()}, user " in status()
        assert ", 1/5 numbers, " in status()
    assert "to do" in status().splitlines()[1], "a process that was killed leaves its note, and no lock"
    claim.failed(ValueError("the matrix is\nsingular"))
    assert "failed" in status() and "the matrix is singular" in status()
    (claim.out.parent / attempt.NOTE).write_text('{"run": ')
    assert "failed" not in status()


@pytest.mark.usefixtures("home")
def test_an_unbuilt_node_is_shown_with_its_last_artifact(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a promotion the plan starts from the new champion; the last artifacts are still shown."""
    monkeypatch.setenv("COLUMNS", "300")
    config = str(write_config(tmp_path / "toy.yaml", target={"count": 3}))
    for node in ("target", "left"):
        assert main(["stage", node, config], TOY) == 0

    def status(*options: str) -> dict[str, list[str]]:
        capsys.readouterr()
        assert main(["status", config, *options], TOY) == 0
        return {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}

    made = status()
    assert made["target"][-1] == made["left"][-1] == "done"
    anew = status("--set", "target.count=4")
    assert " ".join(anew["target"]).endswith(f"to do; last time collect/{made['target'][2]}")
    assert " ".join(anew["left"]).endswith(f"waits for target; last time combine/{made['left'][2]}")
