"""The optimiser loop: schedule, and what it refuses."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.runtime import checkpoint
from draftsmith.stages.runtime.checkpoint import list_checkpoints, load_checkpoint
from draftsmith.stages.runtime.ranks import Ranks
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.config import OptimiserConfig, SftConfig
from draftsmith.stages.training.loss_report import LossReport
from draftsmith.stages.training.optimiser import MicroBatches, cosine, train
from draftsmith.stages.training.sft.body import SftTraining
from draftsmith.stages.training.trainer import TrainingData
from tests.testbed import random_target
from tests.testbed.context import RecordingContext


def test_the_learning_rate_warms_up_and_falls_to_zero_as_a_cosine() -> None:
    config = OptimiserConfig(steps=100, warmup_fraction=0.05)
    factors = [cosine(step, config) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == pytest.approx([0.5 * (1 + math.cos(math.pi * (s - 5) / 95)) for s in range(5, 100)])
    assert 0 < factors[-1] < 1e-3
    for steps in (1, 2, 7):  # even the shortest schedule moves the weights
        factors = [cosine(step, OptimiserConfig(steps=steps)) for step in range(steps)]
        assert factors[0] == 1 and all(0 <= factor <= 1 for factor in factors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_step_is_adamws_with_clipping_and_the_rate_and_dtype_of_the_config(
    dtype: Any, tmp_path: Path, plain_target: Target
) -> None:
    """By its formula, on gradients of which the first is clipped."""
    drafter, context = random_target.random_drafter(plain_target), RecordingContext.under(tmp_path)
    config = OptimiserConfig(steps=4, learning_rate=0.1, warmup_fraction=0.5, compute_dtype=dtype)
    weight = next(drafter.parameters())
    plain = weight.detach().clone()
    slope = torch.randn(plain.shape, generator=torch.Generator().manual_seed(0))
    autocast = []

    def micro_batches(step: int) -> Iterator[LossReport]:
        autocast.append(torch.is_autocast_enabled("cpu"))
        yield LossReport((weight.float() * slope / slope.norm() * 10.0 ** (1 - step)).sum(), step, 10 * step)

    totals = train(context, drafter, config, micro_batches)
    assert (totals["blocks"], totals["positions"]) == (6, 60)
    first, second = torch.zeros_like(plain), torch.zeros_like(plain)
    for step in range(4):
        gradient = slope / slope.norm() * min(1.0, 10.0 ** (1 - step))
        first, second = 0.9 * first + 0.1 * gradient, 0.95 * second + 0.05 * gradient**2
        moved = first / (1 - 0.9 ** (step + 1)) / ((second / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
        rate = 0.1 * (0.5, 1.0, 1.0, 0.5)[step]
        plain = plain - rate * moved
    torch.testing.assert_close(weight.detach(), plain, atol=1e-5, rtol=1e-4)
    logged = [(values["learning_rate"], values["grad_norm"]) for _, values in context.measured]
    assert [rate for rate, _ in logged] == pytest.approx([0.05, 0.1, 0.1, 0.05])
    assert [norm for _, norm in logged] == pytest.approx([10.0, 1.0, 0.1, 0.01], rel=1e-4)
    assert autocast == [dtype == "bfloat16"] * 4


def test_a_gradient_that_is_not_finite_reaches_neither_weights_nor_checkpoint(
    tmp_path: Path, plain_target: Target
) -> None:
    drafter = random_target.random_drafter(plain_target)
    context = RecordingContext.under(tmp_path)
    weight = next(drafter.parameters())

    def micro_batches(step: int) -> list[LossReport]:
        # sqrt has an infinite slope at 0: the loss is finite, its gradient is not
        return [LossReport((weight - weight.detach()).abs().sum().sqrt() if step == 1 else weight.sum(), 1, 1)]

    with pytest.raises(DraftsmithError, match=r"gradient's norm is (nan|inf) at step 1"):
        train(context, drafter, OptimiserConfig(steps=2, compute_dtype="float32"), micro_batches)
    assert all(parameter.isfinite().all() for parameter in drafter.parameters())
    assert list_checkpoints(context.work) == []


@pytest.mark.parametrize("damage", ["a flipped bit", "cut short"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(damage: str, tmp_path: Path, plain_target: Target) -> None:
    whole, context = (RecordingContext.under(tmp_path / name) for name in ("whole", "cut"))
    assert trained(whole, plain_target, steps=7) == trained(context, plain_target, steps=7)
    newest, before = list_checkpoints(context.work)
    assert [path.name[11:19] for path in (newest, before)] == ["00000007", "00000006"]
    spoil(newest, damage)
    context.logs.clear()
    again = trained(context, plain_target, steps=7)
    assert "the checkpoint of step 7 is damaged" in context.logs[0]
    assert "checkpoint of step 6" in context.logs[0]
    assert [step for step, _ in context.measured] == list(range(7))
    assert again == trained(whole, plain_target, steps=7)
    assert len(list_checkpoints(context.work)) == 2
    for path in list_checkpoints(context.work):
        spoil(path, damage)
    assert trained(context, plain_target, steps=7) == again
    assert "from the beginning" in context.logs[-1]


def test_a_killed_attempt_leaves_neither_half_a_checkpoint_nor_metrics_without_one(
    tmp_path: Path, plain_target: Target
) -> None:
    context = RecordingContext.under(tmp_path)
    (context.work / ".tmp-77-checkpoint.new").write_bytes(b"the first half")
    for step in range(2):
        context.metrics(step, loss=9.0)
    trained(context, plain_target, steps=3)
    assert sorted(context.work.iterdir()) == sorted(list_checkpoints(context.work))
    assert [step for step, _ in context.measured] == [0, 1, 2]
    assert all(values["loss"] != 9.0 for _, values in context.measured)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from draftsmith.stages.runtime.checkpoint import CheckpointWriter

folder, values = Path(sys.argv[1]), torch.zeros(2**25)
with CheckpointWriter(folder) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, {"values": values})
        values += 1  # as the next step does
    while not any(folder.glob(".tmp-*")):
        pass
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(tmp_path: Path) -> None:
    process = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], timeout=120, check=False)
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".tmp-*"))) == 1, "it was killed while it wrote"
    found = load_checkpoint(tmp_path, pytest.fail)
    assert found is not None and found[0] == 1
    assert not found[1]["values"].any(), "the state when the checkpoint was begun"


def test_a_checkpoint_that_cannot_be_written_ends_the_training(tmp_path: Path, plain_target: Target) -> None:
    drafter, context, steps = random_target.random_drafter(plain_target), RecordingContext.under(tmp_path), []

    context.work.rename(tmp_path / "folder")
    context.work.symlink_to(tmp_path / "folder")
    (tmp_path / "file").touch()

    def micro_batches(step: int) -> list[LossReport]:
        if step == 2:  # in one operation: the writer makes a folder that is missing
            (tmp_path / "broken").symlink_to(tmp_path / "file")
            (tmp_path / "broken").replace(context.work)
        steps.append(step)
        return [LossReport(next(drafter.parameters()).square().sum(), 1, 1)]

    with pytest.raises(DraftsmithError, match="writing"):
        train(context, drafter, OptimiserConfig(steps=1000, checkpoint_every=1), micro_batches)
    assert len(steps) < 10
    assert list_checkpoints(tmp_path / "folder")


def trained(context: RecordingContext, target: Target, steps: int) -> list[float]:
    """Train with a checkpoint after every step; return some weights."""
    drafter = random_target.random_drafter(target)
    config = OptimiserConfig(steps=steps, compute_dtype="float32", checkpoint_every=1)
    train(context, drafter, config, lambda _: [LossReport(next(drafter.parameters()).square().sum(), 1, 1)])
    return [float(value) for value in next(drafter.parameters()).detach().flatten()[:50]]


def spoil(path: Path, damage: str) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content if damage == "a flipped bit" else content[: len(content) // 2])


@pytest.mark.parametrize(("first_s", "saved"), [(0.0, True), (math.inf, False)])
def test_a_killed_training_continues_from_a_checkpoint_of_its_first_minute(
    first_s: float, saved: bool, tmp_path: Path, plain_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "_FIRST_S", first_s)
    drafter, context = random_target.random_drafter(plain_target), RecordingContext.under(tmp_path)
    config = OptimiserConfig(steps=5)

    def micro_batches(step: int) -> list[LossReport]:
        if step == 3 and not context.logs:
            raise KeyboardInterrupt  # a kill in the middle of a step
        return [LossReport(next(drafter.parameters()).square().sum(), 1, 1)]

    with pytest.raises(KeyboardInterrupt):
        train(context, drafter, config, micro_batches)
    context.logs.append("a second attempt")
    train(context, drafter, config, micro_batches)
    assert any(line.startswith("continuing from the checkpoint at step") for line in context.logs) == saved


def test_the_next_checkpoint_is_due_when_saving_took_at_most_a_fiftieth_of_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])

    def save(*_: object) -> None:
        now[0] += 4

    monkeypatch.setattr(checkpoint, "save_checkpoint", save)
    with checkpoint.CheckpointWriter(tmp_path) as writer:
        due_after = []
        for _ in range(2):
            began = now[0]
            while not writer.are_due():
                now[0] += 1
            due_after.append(now[0] - began)
            writer.save(1, {})
            writer.finish()
        assert due_after == [30, 196], "200 s from the first one's beginning"


def test_a_step_that_does_not_fit_into_memory_is_repeated_in_smaller_micro_batches(
    tmp_path: Path, plain_target: Target
) -> None:
    """Also after some micro-batches had their gradient; later steps keep the smaller size."""
    trajectories = random_target.trajectories(5, seed=8)
    config = SftConfig(steps=3, sequences_per_step=4, anchors_per_sequence=3, compute_dtype="float32")

    def trained(name: str, first: int, fitting: int) -> tuple[torch.Tensor, list[str]]:
        drafter, context = random_target.random_drafter(plain_target), RecordingContext.under(tmp_path / name)
        training = SftTraining(drafter, plain_target, TrainingData(trajectories=trajectories), config)

        def make(step: int, limit: int) -> Iterator[LossReport]:
            for report in training.micro_batches(step, limit):
                yield report
                if limit > fitting:
                    raise torch.OutOfMemoryError("of the test")

        rows = config.anchors_per_sequence * drafter.block_size
        train(context, drafter, config, MicroBatches(make, first, rows, context))
        weights = torch.cat([parameter.detach().flatten() for parameter in drafter.parameters()])
        return weights, [line for line in context.logs if line.startswith("out of memory")]

    whole = 4 * (max(len(t.tokens) for t in trajectories) + 3 * 5)
    small, nothing = trained("small", whole // 4, whole)
    halved, logs = trained("halved", whole, whole // 4)
    assert torch.equal(small, halved)
    assert (len(nothing), len(logs)) == (0, 2) and str(whole // 2) in logs[0]
    with pytest.raises(torch.OutOfMemoryError):
        trained("never", whole, 0)


def test_ranks_that_see_different_checkpoints_are_refused(tmp_path: Path, plain_target: Target) -> None:
    class Two(Ranks):
        def gather(self, mine: Any) -> list[Any]:
            return [mine, 5 if mine == 0 else mine]

    drafter = random_target.random_drafter(plain_target)
    with pytest.raises(RetryableError, match=r"\[0, 5\]"):
        train(RecordingContext.under(tmp_path), drafter, OptimiserConfig(steps=5), lambda _: [], ranks=Two(0, 2))
