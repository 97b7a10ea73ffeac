"""Micro-batches of a step against the step as one batch: the same bookkeeping, the same gradient but for rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from draftsmith.stages.training.batches import FeatureSource, split_rows
from draftsmith.stages.training.config import OpdConfig, SftConfig, TrainingConfig
from draftsmith.stages.training.loss_report import LossReport
from draftsmith.stages.training.opd.body import MinedData, OpdTraining
from draftsmith.stages.training.opd.verify_steps import MinedTable
from draftsmith.stages.training.optimiser import Accumulation
from draftsmith.stages.training.sft.body import SftTraining
from draftsmith.stages.training.trainer import TrainingData
from tests.stages.training.case import mined_table
from tests.testbed import random_target
from tests.testbed.architectures import RANDOM

COUNT = 5
ROUNDING = 1e-5  # float32, of the gradient's norm
STEP = {"sequences_per_step": COUNT, "anchors_per_sequence": 3}
Training = SftTraining | OpdTraining


@pytest.fixture(params=["dflash", "dflash2", "dspark", "eagle3"])
def drafter(request: pytest.FixtureRequest, plain_target: Target) -> Drafter:
    return RANDOM[request.param](plain_target)


@pytest.fixture
def trajectories() -> list[Trajectory]:
    return random_target.trajectories(COUNT, seed=8)


def mined(trajectories: list[Trajectory], K: int) -> MinedTable:
    """Invent steps of all kinds: it does not matter what an untrained drafter proposes."""
    rng = np.random.default_rng(0)
    steps = []
    for t in trajectories:
        anchors = np.arange(t.first_anchor, t.last_anchor + 1, 2)
        verified = np.minimum(K, len(t.tokens) - 1 - anchors)
        accepted: np.ndarray = rng.integers(0, verified + 1)
        logprobs = rng.uniform(-9, -0.1, (len(anchors), K)).astype(np.float32)
        logprobs[np.arange(K) >= verified[:, None]] = np.nan
        proposed = rng.integers(0, random_target.TEXT_TOKENS, (len(anchors), K))
        steps.append(Steps(len(t.tokens), anchors, accepted, proposed, logprobs))
    return mined_table(steps, K)


def trained(make: Callable[[], Training], drafter: Drafter, limit: int | None) -> tuple[LossReport, torch.Tensor, int]:
    """Return the report of step 3, its gradient, and the number of micro-batches."""
    drafter.zero_grad(set_to_none=True)
    accumulation, count = Accumulation(), 0
    for report in make().micro_batches(3, limit):
        accumulation.add(report)
        count += 1
    report = accumulation.finish(drafter.parameters())
    gradient = torch.cat([p.grad.flatten() for p in drafter.parameters() if p.grad is not None])
    return report, gradient, count


CASES: dict[str, dict[str, Any] | None] = {
    "SFT": None,
    "SFT, d_pace": {"weights": "d_pace"},
    "successors": {"anchors": "successors"},
    "chains": {"anchors": "chains"},
    "random, paper": {"anchors": "random", "loss": "paper"},
    "errors, paper": {"anchors": "errors", "loss": "paper", "remine_every": 0},
    "errors, paper, each stream a mean": {
        "anchors": "errors",
        "loss": {"preset": "paper", "pooled": False},
        "remine_every": 0,
    },
    "errors, paper, reduced head": {"anchors": "errors", "loss": "paper", "remine_every": 0, "head_tokens": 20},
    "visited, paper, mined again": {"anchors": "visited", "loss": "paper", "remine_every": 1},
}


SAMPLED = ["SFT", "successors", "chains", "errors, paper, reduced head", "visited, paper, mined again"]


@pytest.mark.parametrize(
    ("name", "sampling"),
    [*((name, GREEDY) for name in CASES), *((name, SamplingParams(0.8, 0.9, 40)) for name in SAMPLED)],
    ids=str,
)
def test_micro_batches_have_the_loss_and_gradient_of_one_batch(
    name: str, sampling: SamplingParams, drafter: Drafter, plain_target: Target, trajectories: list[Trajectory]
) -> None:
    """Random numbers belong to the answers: the same in any micro-batch."""
    fields = CASES[name]
    drafter.frequent_tokens = torch.arange(random_target.VOCAB_SIZE)

    def make() -> Training:
        if name.startswith("SFT"):
            sft = SftConfig.model_validate(STEP | (fields or {}))
            return SftTraining(drafter, plain_target, TrainingData(trajectories=trajectories, sampling=sampling), sft)
        config = OpdConfig.model_validate({**STEP, **(fields or {}), "head_negatives": 3})
        table = mined(trajectories, drafter.block_size - 1)
        return OpdTraining(
            drafter, plain_target, MinedData(trajectories=trajectories, sampling=sampling, mined=table), config
        )

    whole, expected, one = trained(make, drafter, None)
    per_row = 3 * drafter.block_size
    longest = max(len(t.tokens) for t in trajectories)
    for limit, parts in ((1, COUNT), (2 * (longest + per_row), 3)):
        report, gradient, count = trained(make, drafter, limit)
        assert (one, count) == (1, parts)
        assert float((gradient - expected).norm() / expected.norm()) < ROUNDING
        assert float(report.loss) == pytest.approx(float(whole.loss), rel=1e-5)
        assert (report.blocks, report.positions) == (whole.blocks, whole.positions)
        assert report.metrics == pytest.approx(whole.metrics, rel=1e-5)
        assert report.metrics.keys() == whole.metrics.keys()


def test_rows_are_split_in_order_and_one_row_may_exceed_the_limit(
    plain_target: Target, plain_drafter: Drafter, trajectories: list[Trajectory]
) -> None:
    batch = FeatureSource(plain_target, plain_drafter.target_layer_ids, trajectories, TrainingConfig()).batch(
        range(COUNT)
    )
    lengths = [len(t.tokens) for t in trajectories]
    assert split_rows(batch, 10, None) == [slice(0, COUNT)]
    assert split_rows(batch, 10, 1) == [slice(i, i + 1) for i in range(COUNT)]
    for limit in range(20, 5 * (max(lengths) + 10), 7):
        parts = split_rows(batch, 10, limit)
        assert [i for part in parts for i in range(COUNT)[part]] == list(range(COUNT))
        for part in parts:
            padded = len(lengths[part]) * (max(lengths[part]) + 10)
            assert padded <= limit or len(lengths[part]) == 1
    two = batch.select(slice(1, 3))
    assert two.tokens.shape[1] == two.features.shape[1] == max(lengths[1:3])
