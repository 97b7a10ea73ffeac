"""Training steps on the device: compared with the CPU's in float32, under autocast, resumed, with prefetching."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.artifacts.errors import StageInterrupted
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.registry import DrafterConfig
from draftsmith.stages.training.batches import FeatureSource
from draftsmith.stages.training.config import TrainingConfig
from draftsmith.stages.training.optimiser import train
from tests.gpu.trainings import KINDS, Training, make_training
from tests.gpu.world import EAGLE3, TINY, make_drafter, make_target, make_trajectories
from tests.testbed import random_target
from tests.testbed.context import StoppingContext

SHAPES: dict[str, DrafterConfig] = {"dflash": TINY.drafter, "eagle3": EAGLE3}
STEPS, MIDDLE = 8, 4


@dataclass(frozen=True)
class Near:
    """The relative tolerance of a step against the CPU's in float32."""

    loss: float
    gradient: float  # of the norm of all gradients


NEAR = {"float32": Near(1e-4, 1e-3), "bfloat16": Near(0.02, 0.2)}


def training_on(
    device: str, shape: DrafterConfig, kind: str, dtype: str = "float32", **fields: Any
) -> tuple[Drafter, Training]:
    """Return a training on answers that follow a rule. dtype: of the target; the drafter's weights are float32."""
    target = make_target(TINY, device, dtype, alike=True)
    drafter = make_drafter(shape, target, alike=True)
    trajectories = random_target.trajectories(12, seed=5)
    step = {**TINY.step, "compute_dtype": dtype, **fields}
    return drafter, make_training(kind, drafter, target, trajectories, step)


def loss_and_gradient(device: str, shape: DrafterConfig, kind: str, dtype: str) -> tuple[float, torch.Tensor]:
    """Return the loss and the gradient of a first step."""
    drafter, training = training_on(device, shape, kind, dtype)
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        (report,) = training.micro_batches(0, None)
    report.loss.backward()
    gradients = [p.grad.flatten() for p in drafter.parameters() if p.grad is not None]
    assert all(gradient.device.type == device for gradient in gradients)
    return float(report.loss.detach()), torch.cat(gradients).cpu()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step_equals_the_cpus_in_float32(shape: str, kind: str, device: str) -> None:
    expected_loss, expected = loss_and_gradient("cpu", SHAPES[shape], kind, "float32")
    for dtype, near in NEAR.items():
        if (device, dtype) == ("cpu", "float32"):
            continue
        loss, gradient = loss_and_gradient(device, SHAPES[shape], kind, dtype)
        assert loss == pytest.approx(expected_loss, rel=near.loss)
        assert float((gradient - expected).norm() / expected.norm()) < near.gradient


def trained(device: str, folder: Path, kind: str, stop_after: int | None = None) -> list[float]:
    """Return the losses of one attempt under autocast, in micro-batches."""
    drafter, training = training_on(device, TINY.drafter, kind, "bfloat16", steps=STEPS, learning_rate=3e-3)
    context = StoppingContext.under(folder, stop_after=stop_after)
    with suppress(StageInterrupted):
        train(context, drafter, training.config, lambda step: training.micro_batches(step, 80), training.memory)
    return [values["loss"] for _, values in context.measured]


@pytest.mark.parametrize("kind", ["SFT", "OPD"])
def test_a_training_learns_and_continues_from_its_checkpoint(kind: str, device: str, tmp_path: Path) -> None:
    whole = trained(device, tmp_path / "whole", kind)
    assert whole[-1] < whole[0]
    first = trained(device, tmp_path / "parts", kind, stop_after=MIDDLE)
    rest = trained(device, tmp_path / "parts", kind)
    assert (len(first), len(rest)) == (MIDDLE, STEPS - MIDDLE)
    assert first + rest == (whole if device == "cpu" else pytest.approx(whole, rel=0.01))  # sums in any order there


def test_prefetched_features_are_those_of_their_batch(device: str) -> None:
    """While other work runs, in memory that is reused."""
    target = make_target(TINY, device, "bfloat16", alike=True)
    trajectories = make_trajectories(TINY, equally_long=False)
    config = TrainingConfig(tokens_per_target_forward=64, feature_memory_mb=1e-6)
    ahead, in_turn = (
        FeatureSource(target, (2, 0), trajectories, config, ahead=reads_ahead) for reads_ahead in (True, False)
    )
    assert (ahead._stream is not None) == (device == "cuda")
    work = torch.randn(512, 512, device=device)
    steps = [[5, 0, 3], [1, 4, 2]] * 3
    for step, indices in enumerate(steps):
        batch = ahead.batch(indices)
        if step + 1 < len(steps):
            ahead.prefetch(steps[step + 1])
        for _ in range(4):
            work = work @ work / 512
        expected = in_turn.batch(indices)
        assert torch.equal(batch.features, expected.features)
        assert batch.hidden is not None and expected.hidden is not None
        assert torch.equal(batch.hidden, expected.hidden)
