"""EAGLE-3's losses against loops: the training-time test, chains on its own proposals, the head that is its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.training.blocks import LossReport, encode_batch, hidden_on_proposals
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.loss_config import LossConfig
from draftsmith.stages.training.opd.loss import opd_loss
from draftsmith.stages.training.opd.verify_steps import VerifySteps
from draftsmith.stages.training.sft.trainer import sft_loss
from tests.stages.training.case import Case, K, blocks_of, heads_of, loss_context, make_case
from tests.stages.training.reference import Slow, assert_equal, slow_opd, slow_sft
from tests.testbed.eagle3 import random_eagle3


@pytest.fixture
def eagle(plain_target: Target) -> Eagle3Drafter:
    """Return a drafter whose gradients the test may take."""
    return random_eagle3(plain_target)


@pytest.fixture(scope="module")
def eagle_case(plain_target: Target, plain_eagle3: Eagle3Drafter) -> Case:
    """Return the case of the other tests with this drafter's features; most proposals are its own tokens."""
    case = make_case(plain_target, plain_eagle3.target_layer_ids)
    generator = torch.Generator().manual_seed(5)
    shape = case.steps.proposed.shape
    own = plain_eagle3.draft_tokens[torch.randint(0, plain_eagle3.draft_tokens.numel(), shape, generator=generator)]
    replaced = torch.rand(shape, generator=generator) < 0.8
    steps = VerifySteps(**(vars(case.steps) | {"proposed": torch.where(replaced, own, case.steps.proposed)}))
    return replace(case, steps=steps)


# ---- SFT


def sft(case: Case, drafter: Drafter, target: Target, temperature: float = 1.0) -> LossReport:
    return sft_loss(
        drafter,
        case.batch,
        case.anchors,
        loss_context(heads_of(drafter, target), target),
        SftConfig().stream(drafter.recipe),
        temperature=temperature,
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_training_time_test_equals_the_loop(
    temperature: float, eagle_case: Case, eagle: Eagle3Drafter, plain_target: Target
) -> None:
    """Forward KL to the target's distribution over the draft vocabulary, 0.8 a step, on the trajectory's own tokens."""
    report = sft(eagle_case, eagle, plain_target, temperature)
    slow = Slow.owning(eagle_case, eagle, plain_target.head_weight)
    loss, positions, accuracy = slow_sft(slow, "forward_kl", 0.8, temperature)
    assert_equal(report, loss, eagle)
    assert (report.blocks, report.positions) == (len(eagle_case.blocks()), positions)
    assert report.metrics["accuracy"] == pytest.approx(accuracy)
    labels = [
        label
        for row, _, anchor in eagle_case.blocks()
        for label in eagle_case.trajectories[row].tokens[anchor + 1 : anchor + 1 + K]
    ]
    assert positions < len(labels) - 5, "tokens outside the draft vocabulary are left out"


# ---- OPD


OBJECTIVES: dict[str, Any] = {
    "matched": "matched",
    "paper": "paper",
    "forward KL, rejected stream of another weight": {
        "response": {"loss": "forward_kl", "scope": "block", "weight": 0.5},
        "rejected": {"loss": "k3", "weight": 2.0, "positions": {"kind": "power", "delta": 0.5}},
    },
}


def opd(case: Case, drafter: Drafter, target: Target, objective: LossConfig) -> LossReport:
    blocks = blocks_of(case, drafter)
    states = hidden_on_proposals(drafter, encode_batch(drafter, case.batch), blocks, case.steps.proposed)
    context = loss_context(heads_of(drafter, target), target)
    return opd_loss(replace(blocks, on_proposals=states), context, objective, case.steps)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_opd_loss_equals_the_loop(name: str, eagle_case: Case, eagle: Eagle3Drafter, plain_target: Target) -> None:
    """The response stream on the trajectory's tokens, the rejected one on the drafter's own."""
    objective = LossConfig.model_validate(OBJECTIVES[name]).resolved(Eagle3Drafter.recipe, False, 0.0)
    report = opd(eagle_case, eagle, plain_target, objective)
    slow, positions = slow_opd(Slow.owning(eagle_case, eagle, plain_target.head_weight), objective)
    assert_equal(report, slow, eagle)
    assert (report.blocks, report.positions) == (len(eagle_case.blocks()), positions)


def test_a_batch_without_a_token_of_the_draft_vocabulary_has_a_zero_loss(
    eagle_case: Case, eagle: Eagle3Drafter, plain_target: Target
) -> None:
    """Such a batch is possible with a small vocabulary and few anchors."""
    outside = next(t for t in range(64) if t not in eagle.draft_tokens.tolist())
    tokens = torch.full_like(eagle_case.batch.tokens, outside)
    report = sft(replace(eagle_case, batch=replace(eagle_case.batch, tokens=tokens)), eagle, plain_target)
    assert (float(report.loss.detach()), report.positions) == (0.0, 0)
    report.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in eagle.parameters())
