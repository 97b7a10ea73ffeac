"""SFT's loss against a loop over rows, anchors and offsets: value, gradient and counts."""

from __future__ import annotations

import math

import pytest
import torch

from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.training.blocks import SoftmaxHeads
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.sft.trainer import sft_loss
from tests.stages.training.case import Case, loss_context
from tests.stages.training.reference import Slow, assert_equal, slow_sft


@pytest.mark.parametrize("gamma", [2.0, 7.0])
@pytest.mark.parametrize("part", [False, True])
def test_sft_loss_equals_the_loop(
    gamma: float, part: bool, case: Case, drafter: DFlashDrafter, plain_target: Target
) -> None:
    tokens = list(range(0, 64, 2)) if part else list(range(64))
    head = Head.over(plain_target.head_weight, torch.tensor(tokens))
    report = sft_loss(
        drafter,
        case.batch,
        case.anchors,
        loss_context(SoftmaxHeads(head, head, trained=False), plain_target),
        SftConfig(gamma=gamma).stream(drafter.recipe),
        temperature=1.0,
    )
    slow = Slow.borrowing(case, drafter, plain_target.head_weight, tokens)
    loss, positions, accuracy = slow_sft(slow, "cross_entropy", math.exp(-1 / gamma))
    assert_equal(report, loss, drafter)
    assert (report.blocks, report.positions) == (len(case.blocks()), positions)
    assert report.metrics["accuracy"] == pytest.approx(accuracy)
