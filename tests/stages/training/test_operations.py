"""The operations that a training step reports, against those that torch counts while it runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from draftsmith.stages.drafters import block_attention
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.anchors import position_anchors
from draftsmith.stages.training.batches import FeatureSource, step_rng
from draftsmith.stages.training.config import LoraOptions, SftConfig, TrainingConfig
from draftsmith.stages.training.lora import Adapter
from draftsmith.stages.training.loss_report import LossReport
from draftsmith.stages.training.sft.body import sft_loss
from draftsmith.stages.training.softmax_heads import LossContext
from tests.stages.kernel_flops import KERNEL_FLOPS
from tests.stages.training.case import heads_of
from tests.testbed import random_target
from tests.testbed.architectures import RANDOM

# The target's distribution is not the drafter's work: with cross-entropy and blocks that are read one by one, so that
# none attends beyond its anchor, what is counted are the products of the formula.
TOLERANCE = {None: 0.02, 4: 0.04}  # with an adapter, gradients of the first layer's input are counted, which it lacks


@pytest.fixture(params=RANDOM)
def any_drafter(request: pytest.FixtureRequest, plain_target: Target) -> Drafter:
    return RANDOM[request.param](plain_target)


@pytest.mark.parametrize("rank", [None, 4])
def test_the_formula_is_what_torch_counts(
    rank: int | None, any_drafter: Drafter, plain_target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rank is not None:
        Adapter(any_drafter, LoraOptions(rank=rank), "float32", 0)
    monkeypatch.setattr(block_attention, "_MASK_ENTRIES", 1)
    trajectories = random_target.trajectories(1, seed=5)
    batch = FeatureSource(plain_target, any_drafter.target_layer_ids, trajectories, TrainingConfig()).batch([0])
    anchors = position_anchors(trajectories, 4, step_rng(0, 0).random(1), torch.device("cpu"))
    stream = SftConfig(loss="cross_entropy").stream(any_drafter.recipe)

    def step() -> LossReport:
        heads = heads_of(any_drafter, plain_target)
        context = LossContext(heads, plain_target.head_weight, positions_per_chunk=1024)
        report = sft_loss(any_drafter, batch, anchors, context, stream, temperature=1.0)
        report.loss.backward()
        any_drafter.zero_grad(set_to_none=True)
        return report

    with FlopCounterMode(display=False, custom_mapping=KERNEL_FLOPS) as counter:
        report = step()
    assert counter.get_total_flops() == pytest.approx(report.operations, rel=TOLERANCE[rank])
