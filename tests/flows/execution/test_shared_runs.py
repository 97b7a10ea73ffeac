"""Building one node's artifact while other runs, of this home or another one, use the same store."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import boto3
import pytest

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.artifacts.locks import LockWait
from draftsmith.artifacts.store.manifest import MANIFEST, Artifact
from draftsmith.artifacts.store.mirror import STORE_VARIABLE
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.cli.main import main
from draftsmith.flows.config.options import StageOptions, check_runner
from draftsmith.flows.execution import machine
from draftsmith.flows.execution.display import Display
from draftsmith.flows.execution.make import MakeShard, RunContext, ShardPool, make, run_locally
from draftsmith.flows.execution.process import StageFailedError
from draftsmith.flows.orchestration.flow_run import CancelledError
from draftsmith.flows.planning.plan import Build, OutdatedPlanError
from draftsmith.stages.runtime.stage import Compute
from tests.flows.toy import TOY, ToyConfig, ToyPipeline, toy_nodes, write_config
from tests.flows.toy_stages.collect import CollectConfig
from tests.flows.toy_stages.squares import SquaresConfig
from tests.testbed.s3 import SECRET, bucket


def test_code_edited_while_a_stage_waits_builds_nothing_under_the_old_key(
    tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = ["old"]

    class Edited(ToyPipeline):
        def code_digest(self, module: str) -> str:
            return f"{module} {source[0]}"

    pipeline = Edited()
    config = ToyConfig(name="t", squares=SquaresConfig())
    node = {node.name: node for node in toy_nodes(config)}["squares"]
    context = RunContext(tmp_path, config, Display(), tracking)
    target = make(context, Build.of(pipeline, config, toy_nodes(config)[-1], {}))
    build = Build.of(pipeline, config, node, {"first": target})

    def edits(*arguments: Any, **keywords: Any) -> Any:
        source[0] = "new"
        return machine.lock_devices(*arguments, **keywords)

    monkeypatch.setattr("draftsmith.flows.execution.make.lock_devices", edits)
    with pytest.raises(OutdatedPlanError, match="squares: the code here is not the code of its cache key"):
        make(context, build)
    assert [each.stage for each in context.store.list()] == ["collect"]
    build = Build.of(pipeline, config, node, {"first": target})  # as the next command plans
    assert make(context, build).manifest.code_digest.endswith("new")


def test_an_interrupted_commit_is_finished_with_its_manifest_in_mlflow(
    tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ToyConfig(name="t")
    context = RunContext(tmp_path, config, Display(), tracking)

    def full(path: Path, _text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patched, pytest.raises(DraftsmithError, match="the disk is full"):
        patched.setattr("draftsmith.artifacts.store.local.write_text", full)
        make(context, Build.of(TOY, config, toy_nodes(config)[-1], {}))
    manifest = make(context, Build.of(TOY, config, toy_nodes(config)[-1], {})).manifest
    client, _ = tracking.connect()
    run = client.get_run(str(manifest.mlflow_run_id))
    assert run.info.status == "FINISHED"
    copy = client.download_artifacts(run.info.run_id, MANIFEST, str(tmp_path))
    assert json.loads(Path(copy).read_text())["metrics"] == manifest.metrics != {}


@pytest.mark.parametrize("waits_for", ["the artifact", "the CPU"])
def test_a_run_cancelled_while_it_waits_starts_nothing(
    waits_for: str, tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(machine.FOLDER, str(tmp_path / "devices"))
    monkeypatch.setattr("draftsmith.flows.execution.machine.gpu_names", list)
    target = CollectConfig(note_start=tmp_path / "started")
    config = ToyConfig(name="t", target=target, stages=StageOptions(lock_wait_minutes=0.5))
    node = next(node for node in toy_nodes(config) if node.name == "target")

    def cancelled() -> None:
        raise CancelledError("cancelled in Prefect")

    context = RunContext(tmp_path / "home", config, Display(), tracking)
    monkeypatch.setattr(context, "check", cancelled)
    build = Build.of(TOY, config, node, {})
    with ExitStack() as others:
        if waits_for == "the artifact":
            others.enter_context(context.store.claim("collect", build.key))
        else:
            others.enter_context(machine.lock_devices(Compute.TIMED, "", LockWait(1)))
        with pytest.raises(CancelledError):
            make(context, build)
    assert not (tmp_path / "started").exists() and not list(context.home.glob("logs/*.request.json"))


def squares(
    home: Path, tracking: Tracking, shards: int, *, note: Path, die: Path | None = None, pool: ShardPool = run_locally
) -> Artifact:
    """Build the node `squares` in shards."""
    told = SquaresConfig(note_start=note, die=die)
    config = ToyConfig(name="t", squares=told, stages=StageOptions(shards=shards))
    nodes = {node.name: node for node in toy_nodes(config)}
    context = RunContext(home, config, Display(), tracking)
    context.pool = pool
    target = make(context, Build.of(TOY, config, nodes["target"], {}))
    return make(context, Build.of(TOY, config, nodes["squares"], {"first": target}))


def test_shards_change_nothing_and_a_killed_one_is_rebuilt_alone(
    tmp_path: Path, tracking: Tracking, capsys: pytest.CaptureFixture[str]
) -> None:
    note, die = tmp_path / "note", tmp_path / "die"
    made = {count: squares(tmp_path / f"{count}", tracking, count, note=note, die=die) for count in (1, 3)}
    assert made[1].key == made[3].key and made[1].content_id == made[3].content_id
    assert (made[1].path / "squares.json").read_bytes() == (made[3].path / "squares.json").read_bytes()
    first, *shards, last = note.read_text().splitlines()
    assert (first, last) == ("whole", "joined")
    assert sorted(shards) == [f"{n} of 3, device any" for n in (1, 2, 3)]
    assert "squares: done in" in capsys.readouterr().out
    assert len(list((tmp_path / "3" / "store" / "squares.shard").glob("[!.]*"))) == 3

    note.unlink()
    die.touch()
    with pytest.raises(StageFailedError, match=r"stage squares\.shard was killed \(SIGKILL\)"):
        squares(tmp_path / "killed", tracking, 3, note=note, die=die)
    die.unlink()
    again = squares(tmp_path / "killed", tracking, 3, note=note, die=die)
    assert again.content_id == made[1].content_id
    assert sorted(note.read_text().splitlines()) == [
        "1 of 3, device any",
        *["2 of 3, device any"] * 2,
        "3 of 3, device any",
        "joined",
    ]


def test_each_shard_has_its_own_gpu(tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.FOLDER, str(tmp_path / "devices"))
    for module in ("machine", "make"):
        monkeypatch.setattr(f"draftsmith.flows.execution.{module}.gpu_names", lambda: ["GPU-a", "GPU-b"])
    squares(tmp_path / "home", tracking, 2, note=tmp_path / "note")
    told = [line.partition("device ")[2] for line in (tmp_path / "note").read_text().splitlines()]
    assert sorted(told) == ["", "GPU-a", "GPU-b"]  # and none for joining them


def test_a_run_that_ends_asks_its_shards_to_stop(tmp_path: Path, tracking: Tracking) -> None:
    def ended(
        shards: Sequence[Build], make_one: MakeShard, stop: Callable[[], None], check: Callable[[], None]
    ) -> list[Artifact]:
        stop()
        return run_locally(shards, make_one, stop, check)

    with pytest.raises(StageInterrupted, match="Run the same command to continue"):
        squares(tmp_path / "home", tracking, 2, note=tmp_path / "note", pool=ended)


def test_a_missing_runner_is_reported_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    check_runner(StageOptions())
    with pytest.raises(DraftsmithError, match=r"^stages\.runner: .*pip install 'draftsmith\[ray\]'"):
        check_runner(StageOptions.model_validate({"runner": "ray", "shards": 2}))


@pytest.fixture
def homes(tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """Return two homes with a common store in a bucket, as on two hosts."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", tracking.uri)
    monkeypatch.setenv(STORE_VARIABLE, "s3://teams/line")
    with bucket("teams"):
        yield tmp_path / "a", tmp_path / "b"


def test_hosts_with_a_common_bucket_reuse_each_others_artifacts(
    homes: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(write_config(tmp_path / "toy.yaml", target={"note_start": str(tmp_path / "started")}))

    def at(home: Path, *command: str) -> str:
        monkeypatch.setenv("DRAFTSMITH_HOME", str(home))
        assert main(list(command), TOY) == 0
        return capsys.readouterr().out

    a, b = homes
    for node in ("target", "left"):
        at(a, "stage", node, config)
    assert at(b, "status", config).count(" done") == 2 and at(b, "status").count(" done") == 2
    assert "target: not new: collect/" in at(b, "why", config, "target")
    plan = at(b, "run", config, "--plan")
    assert plan.count("reused") >= 2
    here = {path.parent.parent.name: sorted(p.name for p in path.parent.iterdir()) for path in b.rglob(MANIFEST)}
    assert here == {"collect": [MANIFEST], "combine": [MANIFEST]}

    at(b, "stage", "right", config)  # reads only the target
    here = {path.parent.parent.name: sorted(p.name for p in path.parent.iterdir()) for path in b.rglob(MANIFEST)}
    assert here["collect"] == [MANIFEST, "metrics.jsonl", "numbers.json"]
    assert (tmp_path / "started").read_text() == "started\n"
    at(a, "stage", "total", config)  # what B has made
    shown = at(b, "show", "collect", "--verify")
    assert "every checksum is right" in shown and "store:      s3://teams/line" in shown and "numbers.json" in shown
    total = next(line.split()[1] for line in at(b, "status", config).splitlines() if line.startswith("total"))
    assert total == "combine"

    # what is lost in the bucket is built again, although a home has a copy
    for each in boto3.client("s3").list_objects_v2(Bucket="teams", Prefix="line/collect/")["Contents"]:
        boto3.client("s3").delete_object(Bucket="teams", Key=each["Key"])
    assert "to do" in at(tmp_path / "c", "status", config)
    assert "nothing to remove" in at(b, "prune")
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or SECRET.encode() not in path.read_bytes()
