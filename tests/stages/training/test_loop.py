"""The optimiser loop: schedule, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.blocks import LossReport
from draftsmith.stages.training.config import OptimiserConfig
from draftsmith.stages.training.loop import cosine, train
from tests.testbed import random_target
from tests.testbed.context import RecordingContext


def test_the_learning_rate_warms_up_and_falls_to_zero_as_a_cosine() -> None:
    config = OptimiserConfig(steps=100, warmup_fraction=0.05)
    factors = [cosine(step, config) for step in range(100)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5:] == pytest.approx([0.5 * (1 + math.cos(math.pi * (s - 5) / 95)) for s in range(5, 100)])
    assert 0 < factors[-1] < 1e-3


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_even_the_shortest_schedule_moves_the_weights(steps: int) -> None:
    factors = [cosine(step, OptimiserConfig(steps=steps)) for step in range(steps)]
    assert factors[0] == 1
    assert all(0 <= factor <= 1 for factor in factors)


def test_a_loss_that_is_not_finite_is_one_clear_error(tmp_path: Path, plain_target: Target) -> None:
    drafter = random_target.random_drafter(plain_target)

    def loss_of_step(step: int) -> LossReport:
        return LossReport(next(drafter.parameters()).sum() * (math.nan if step == 2 else 1.0), 1, 1)

    with pytest.raises(DraftsmithError, match="loss is nan at step 2"):
        train(RecordingContext.under(tmp_path), drafter, OptimiserConfig(steps=5), loss_of_step)


def test_a_gradient_that_is_not_finite_reaches_neither_weights_nor_checkpoint(
    tmp_path: Path, plain_target: Target
) -> None:
    drafter = random_target.random_drafter(plain_target)
    context = RecordingContext.under(tmp_path)
    weight = next(drafter.parameters())

    def loss_of_step(step: int) -> LossReport:
        # sqrt has an infinite slope at 0: the loss is finite, its gradient is not
        return LossReport((weight - weight.detach()).abs().sum().sqrt() if step == 1 else weight.sum(), 1, 1)

    with pytest.raises(DraftsmithError, match=r"gradient's norm is (nan|inf) at step 1; lower learning_rate"):
        train(context, drafter, OptimiserConfig(steps=2, compute_dtype="float32"), loss_of_step)
    assert all(parameter.isfinite().all() for parameter in drafter.parameters())
    assert not (context.work / "checkpoint.pt").exists()


def test_metrics_of_an_attempt_that_reached_no_checkpoint_are_not_kept(tmp_path: Path, plain_target: Target) -> None:
    drafter = random_target.random_drafter(plain_target)
    context = RecordingContext.under(tmp_path)
    context.metrics(0, loss=9.0)
    context.metrics(1, loss=9.0)
    train(context, drafter, OptimiserConfig(steps=2), lambda _: LossReport(next(drafter.parameters()).sum(), 1, 1))
    assert [step for step, _ in context.measured] == [0, 1]
    assert all(values["loss"] != 9.0 for _, values in context.measured)


def test_a_truncated_training_checkpoint_is_one_clear_error(tmp_path: Path, plain_target: Target) -> None:
    drafter = random_target.random_drafter(plain_target)
    context = RecordingContext.under(tmp_path)
    config = OptimiserConfig(steps=2, compute_dtype="float32")
    train(context, drafter, config, lambda _: LossReport(next(drafter.parameters()).square().sum(), 1, 1))
    path = context.work / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DraftsmithError, match=r"checkpoint\.pt: cannot be read"):
        train(context, drafter, config, lambda _: LossReport(torch.zeros(()), 1, 1))


def test_totals_are_sums_over_all_steps(tmp_path: Path, plain_target: Target) -> None:
    drafter = random_target.random_drafter(plain_target)

    def loss_of_step(step: int) -> LossReport:
        return LossReport(next(drafter.parameters()).square().sum(), step, 10 * step)

    totals = train(RecordingContext.under(tmp_path), drafter, OptimiserConfig(steps=4), loss_of_step)
    assert (totals["blocks"], totals["positions"]) == (6, 60)
