"""The operations that a training step reports, against those that torch counts while it runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.anchors import position_anchors
from draftsmith.stages.training.batches import FeatureSource, step_rng
from draftsmith.stages.training.blocks import LossReport
from draftsmith.stages.training.config import SftConfig, TrainingConfig
from draftsmith.stages.training.supervised import sft_loss
from draftsmith.stages.training.vocabulary import HeadSource
from tests.testbed import random_target

# The target's distribution is not the drafter's work, and torch counts no attention kernel on a CPU: with cross-entropy
# and little text, what is left are the products of the formula (and for EAGLE-3 none of a chain's own entries).
TOLERANCE = 0.02


@pytest.fixture(params=["plain_drafter", "plain_eagle3"])
def any_drafter(request: pytest.FixtureRequest) -> Drafter:
    drafter: Drafter = request.getfixturevalue(request.param)
    return drafter


def test_the_formula_is_what_torch_counts(any_drafter: Drafter, plain_target: Target) -> None:
    trajectories = random_target.trajectories(3, seed=5)
    batch = FeatureSource(plain_target, any_drafter.target_layer_ids, trajectories).batch([0, 1, 2])
    anchors = position_anchors(trajectories, 4, step_rng(0, 0), torch.device("cpu"))
    heads = HeadSource(any_drafter, plain_target.head_weight, TrainingConfig()).draw(step_rng(0, 0), [batch.tokens])
    stream = SftConfig(loss="cross_entropy").stream(any_drafter.recipe)

    def step() -> LossReport:
        report = sft_loss(
            any_drafter,
            batch,
            anchors,
            heads,
            plain_target.head_weight,
            stream,
            temperature=1.0,
            positions_per_chunk=1024,
        )
        report.loss.backward()
        any_drafter.zero_grad(set_to_none=True)
        return report

    with FlopCounterMode(display=False) as counter:
        report = step()
    assert isinstance(any_drafter, DFlashDrafter | Eagle3Drafter)
    counted = counter.get_flop_counts()["Global"]
    attention = sum(value for kernel, value in counted.items() if "attention" in str(kernel))
    expected = report.operations - (0 if attention else _attention(any_drafter, batch.tokens.shape, anchors.positions))
    assert counter.get_total_flops() == pytest.approx(expected, rel=TOLERANCE)


def _attention(drafter: Drafter, tokens: torch.Size, anchors: torch.Tensor) -> float:
    """DFlash's share of the formula that goes through a kernel which torch does not count."""
    if not isinstance(drafter, DFlashDrafter):
        return 0.0
    c, B = drafter.config, drafter.block_size
    keys = tokens[1] + anchors.shape[1] * B
    return 2.0 * 3 * c.num_hidden_layers * 2 * anchors.numel() * B * c.num_attention_heads * c.head_dim * keys
