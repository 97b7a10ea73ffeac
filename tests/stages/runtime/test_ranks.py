"""Training by several processes: the same as by one (1e-5 in float32), continued by another number of processes;
lost ranks, signals, and a second node."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.elastic.rendezvous import RendezvousTimeoutError

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.base import Drafter, DrafterInfo
from draftsmith.stages.drafters.checkpoint import save_drafter
from draftsmith.stages.replay.stage import STAGE as MINING
from draftsmith.stages.runtime.checkpoint import list_checkpoints
from draftsmith.stages.runtime.launch import RankReport, _cause, launch
from draftsmith.stages.runtime.stage import RENDEZVOUS, ParallelConfig
from draftsmith.stages.targets.causal_lm import Target
from tests.flows.processes import ROOT, assert_gone, wait_until
from tests.stages.runtime import hanging_rank, short_of_memory
from tests.stages.runtime.attempts import CONFIG, LONG, SFT, TWO, attempt, newest, ranks_of
from tests.stages.runtime.test_stage_process import finish
from tests.stages.runtime.test_stage_process import start as start_stage
from tests.stages.runtime.trainings import AGAIN, IN_PARTS, MIDDLE, REDUCED, STEPS, Training, run_all
from tests.testbed import random_target
from tests.testbed.context import RecordingContext
from tests.testbed.dflash2 import random_dflash2
from tests.testbed.dspark import random_dspark
from tests.testbed.eagle3 import random_eagle3

DFLASH = {"num_layers": 1, "block_size": 5, "target_layer_ids": [2, 0]}
EAGLE3 = {"kind": "eagle3", "block_size": 4, "target_layer_ids": [0, 1, 2], "draft_vocab_size": 40}
DFLASH2 = {**DFLASH, "kind": "dflash2"}
DSPARK = {**DFLASH, "kind": "dspark"}
NAMES = ["sft dflash", "sft dflash2", "sft dspark", "sft eagle3", "opd dflash", "opd chains", "opd adapter",
         "opd eagle3 again", "opd dflash2 sampled", "opd dspark sampled again"]  # fmt: skip


@pytest.fixture(scope="module")
def trainings(tmp_path_factory: pytest.TempPathFactory, plain_artifact: Path, plain_target: Target) -> list[Training]:
    folder = tmp_path_factory.mktemp("inputs")
    answers = random_target.write_trajectories(folder / "answers", random_target.trajectories(12, seed=5))
    inputs = {"target": str(plain_artifact), "trajectories": str(answers)}
    made = [
        Training("sft dflash", SFT, {"drafter": DFLASH, **REDUCED, **IN_PARTS}, inputs),
        Training("sft dflash2", SFT, {"drafter": DFLASH2, **REDUCED}, inputs),
        Training("sft dspark", SFT, {"drafter": DSPARK, **IN_PARTS}, inputs),
        Training("sft eagle3", SFT, {"drafter": EAGLE3}, inputs),
    ]
    sampled = random_target.write_trajectories(folder / "1.0", random_target.trajectories(12, seed=6), temperature=1.0)
    again = {**AGAIN, **REDUCED, **IN_PARTS}
    for name, drafter, texts, config in (
        ("dflash", random_target.random_drafter(plain_target), answers, {}),
        ("chains", random_target.random_drafter(plain_target), answers, {**IN_PARTS, "anchors": "chains"}),
        ("adapter", random_target.random_drafter(plain_target), answers, {**IN_PARTS, "lora": {"rank": 4}}),
        ("eagle3 again", random_eagle3(plain_target), answers, again),
        # with steps of 1e-3 one weight of four ranks that shared two targets ended 1.1e-5 away, all others within 1e-6
        ("dflash2 sampled", random_dflash2(plain_target), sampled, {**IN_PARTS, "learning_rate": 3e-4}),
        ("dspark sampled again", random_dspark(plain_target), sampled, again),
    ):
        opd_inputs = mined(folder / name, drafter, plain_target, {**inputs, "trajectories": str(texts)})
        made.append(Training(f"opd {name}", "draftsmith.stages.training.opd.stage", config, opd_inputs))
    return made


def mined(folder: Path, drafter: Drafter, target: Target, inputs: dict[str, str]) -> dict[str, str]:
    """Return the inputs of OPD."""
    drafter.frequent_tokens = torch.arange(random_target.VOCAB_SIZE)
    drafter.info = DrafterInfo(target.info.digest, target.info.source, (), {})
    save_drafter(drafter, folder / "drafter" / DRAFTER_FOLDER, torch.float32)
    inputs = {**inputs, "drafter": str(folder / "drafter")}
    context = RecordingContext.under(folder / "mining", {name: Path(path) for name, path in inputs.items()})
    return {**inputs, "mined": str(context.run(MINING).out)}


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory, trainings: list[Training]) -> dict[str, RecordingContext]:
    """Train with one process; return the contexts by name."""
    contexts = {}
    for training in trainings:
        inputs = {name: Path(path) for name, path in training.inputs.items()}
        contexts[training.name] = RecordingContext.under(tmp_path_factory.mktemp("one"), inputs)
        training.run(contexts[training.name])
    return contexts


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, trainings: list[Training]) -> Path:
    """Train with three processes and a sharded AdamW to the middle, then with two that share a target."""
    folder = tmp_path_factory.mktemp("several")
    with pytest.raises(StageInterrupted):
        start(folder, trainings, 3, MIDDLE, {"parallel": {"processes": 3, "shard_optimiser": True}})
    start(folder, trainings, 2, None, {"parallel": {"processes": 2, "target_parallel": 2}})
    return folder


def start(folder: Path, trainings: list[Training], processes: int, stop_after: int | None, fields: Any) -> None:
    launch(
        ParallelConfig(processes=processes),
        run_all,
        (trainings, str(folder), stop_after, fields),
        notes=folder / "ranks",
        stop=threading.Event(),
    )


@pytest.mark.parametrize("name", NAMES)
def test_several_processes_train_the_same_drafter_as_one(
    name: str, one: dict[str, RecordingContext], several: Path
) -> None:
    """Compare every step's loss and metrics, and the final weights."""
    alone = one[name]
    first, second = (json.loads((several / name / f"reports-{world}.json").read_text()) for world in (3, 2))
    assert f"continuing from the checkpoint at step {MIDDLE} of {STEPS}" in second["logs"]
    measured = first["measured"] + second["measured"]
    assert [step for step, _ in measured] == [step for step, _ in alone.measured] == list(range(STEPS))
    for (_, ours), (_, theirs) in zip(measured, alone.measured, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    for total in ("blocks", "positions"):
        assert second["summaries"][total] == pytest.approx(alone.summaries[total])
    ours, theirs = (
        load_file(out / DRAFTER_FOLDER / "model.safetensors") for out in (several / name / "out", alone.out)
    )
    assert ours.keys() == theirs.keys()
    for tensor, values in theirs.items():
        torch.testing.assert_close(ours[tensor], values, rtol=0, atol=1e-5, msg=lambda text: f"{tensor}: {text}")  # noqa: B023


@pytest.fixture(scope="module")
def inputs(trainings: list[Training]) -> dict[str, str]:
    return dict(trainings[0].inputs)


def test_a_lost_rank_ends_all_ranks_with_one_error(tmp_path: Path, inputs: dict[str, str]) -> None:
    """The ranks belong to the process group of the stage, which ends with its parent."""
    lifeline, our_end = os.pipe()
    process = start_stage(tmp_path, SFT, {**CONFIG, **TWO}, inputs=inputs, lifeline=lifeline, threads=1)
    os.close(lifeline)

    def has_checkpoint() -> bool:
        assert process.poll() is None, process.communicate()
        return bool(list_checkpoints(tmp_path / "work"))

    wait_until(has_checkpoint, "the first checkpoint", limit_s=180)
    ranks = ranks_of(tmp_path)
    assert ranks.keys() == {0, 1}
    assert {os.getpgid(pid) for pid in ranks.values()} == {process.pid}
    os.kill(ranks[1], signal.SIGKILL)
    code, events, _ = finish(process)
    os.close(our_end)
    errors = [event for event in events if event["event"] == "error"]
    assert (code, len(errors)) == (75, 1)
    assert "rank 1 of 2 was lost, with exit code -9" in errors[0]["message"]
    for pid in ranks.values():
        assert_gone(pid)

    kept = newest(tmp_path)
    alone, events = attempt(tmp_path, inputs)
    assert (alone, events[-1]["event"]) == (0, "done")
    logs = [event["message"] for event in events if event["event"] == "log"]
    assert f"continuing from the checkpoint at step {kept} of {LONG}" in logs
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(LONG))


@pytest.fixture
def other_node() -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run another node as configs/scale/README.md does; yield the rendezvous' port and the process."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    torchrun = f"{sys.executable} -m torch.distributed.run --nnodes=2 --nproc-per-node=1 --local-addr=localhost"
    meeting = f"--rdzv-backend=c10d --rdzv-endpoint=localhost:{port} --rdzv-conf=is_host=0"
    loop = f"while true; do {torchrun} {meeting} -m draftsmith.stages.runtime.join; sleep 1; done"
    process = subprocess.Popen(["bash", "-c", loop], cwd=ROOT, start_new_session=True)
    yield port, process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_two_nodes_train_together_and_report_a_lost_rank_and_a_stop(
    tmp_path: Path,
    inputs: dict[str, str],
    other_node: tuple[int, subprocess.Popen[bytes]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The flow's node reports a lost rank; the next attempt finds the other node; all ranks stop at the same step."""
    port, node = other_node
    monkeypatch.setenv(RENDEZVOUS, f"localhost:{port}")
    fields = {**CONFIG, "parallel": {"nodes": 2}}

    def start_training(after: int) -> subprocess.Popen[bytes]:
        process = start_stage(tmp_path, SFT, fields, inputs=inputs, threads=1)

        def there() -> bool:
            assert process.poll() is None, process.communicate()
            return bool(list_checkpoints(tmp_path / "work")) and newest(tmp_path) > after

        wait_until(there, f"a checkpoint after step {after}", limit_s=180)
        return process

    lost = start_training(0)
    (rank,) = (
        child.pid
        for child in psutil.Process(node.pid).children(recursive=True)
        if {"draftsmith.stages.runtime.join"}
        == {each for each in child.cmdline() if each.startswith(("draftsm", "torch."))}
    )
    os.kill(rank, signal.SIGKILL)
    code, events, _ = finish(lost)
    assert code == 75 and "rank 1 of 2" in events[-1]["message"]
    stopped = start_training(newest(tmp_path))
    stopped.send_signal(signal.SIGTERM)
    code, events, _ = finish(stopped)
    assert (code, events[-1]["kind"]) == (130, "StageInterrupted")
    done = [event["done"] for event in events if event["event"] == "progress"]
    assert newest(tmp_path) == done[-1], "a stopped training saves its last step"


def test_a_rank_that_cannot_write_its_report_counts_as_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(path: Path, *_: Any) -> None:
        path.touch()  # names still fit
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", refused)
    RankReport(0, "writing metrics.jsonl: the disk is full", 2).write(tmp_path)
    cause = _cause(tmp_path, OSError("gone"), ParallelConfig(processes=2), stopped=False)
    assert (type(cause), cause.exit_code) == (DraftsmithError, 2)
    assert "rank 0" in str(cause) and "the disk is full" in str(cause)


@pytest.mark.parametrize(
    ("reported", "code", "exit_code"),
    [
        ({0: "RuntimeError: Connection closed by peer [10.0.0.2]:4711"}, 1, 75),  # rank 1 has no report: it was lost
        ({0: "RuntimeError: Connection closed by peer", 1: "RuntimeError: Connection closed by peer"}, 1, 1),
        ({0: "ValueError: a defect"}, 1, 1),
        ({}, 1, 75),  # the other node never came
        ({0: "init_from: nothing is not there", 1: "init_from: nothing is not there"}, 2, 2),  # bad input is one error
    ],
)
def test_the_loss_of_another_node_is_retryable(
    reported: dict[int, str], code: int, exit_code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("draftsmith.stages.runtime.launch._ECHO_S", 0.0)
    for rank, message in reported.items():
        RankReport(rank, message, code).write(tmp_path)
    monkeypatch.setenv(RENDEZVOUS, "first-node:29400")
    error = _cause(tmp_path, RendezvousTimeoutError(), ParallelConfig(nodes=2), stopped=False)
    assert error.exit_code == exit_code
    assert code == 1 or str(error) == reported[0]


def test_a_rank_that_hangs_is_named_in_a_retryable_error(tmp_path: Path, inputs: dict[str, str]) -> None:
    code, events = attempt(tmp_path, inputs, hanging_rank.__name__, **TWO)
    errors = [event for event in events if event["event"] == "error"]
    assert (code, len(errors)) == (75, 1)
    assert "rank 1 of 2 did not answer: rank 0 timed out (" in errors[0]["message"]


def test_after_a_rank_ran_out_of_memory_the_next_attempt_takes_smaller_micro_batches(
    tmp_path: Path, inputs: dict[str, str]
) -> None:
    """It continues from the checkpoint, with any number of processes."""
    steps = short_of_memory.REFUSED_AT + 3
    fields: dict[str, Any] = {"module": short_of_memory.__name__, "steps": steps}
    fields["micro_batch_tokens"] = 2 * short_of_memory.FITTING - 8
    code, events = attempt(tmp_path, inputs, **fields, **TWO)
    errors = [event for event in events if event["event"] == "error"]
    assert (code, len(errors)) == (75, 1)
    assert "rank 1 of 2: out of memory with micro-batches of 72 tokens" in errors[0]["message"]

    kept = newest(tmp_path)
    code, events = attempt(tmp_path, inputs, **fields)
    assert (code, events[-1]["event"]) == (0, "done")
    logs = [event["message"] for event in events if event["event"] == "log"]
    assert any("micro-batches of 36 tokens" in line for line in logs)
    assert f"continuing from the checkpoint at step {kept} of {steps}" in logs
