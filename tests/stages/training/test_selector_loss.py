"""Losses of a drafter with a selector against loops: of its head, of its selector, and of its own proposals."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from draftsmith.stages.drafters.dflash2.model import DFlash2Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.sampling import GREEDY, SamplingParams
from draftsmith.stages.training.blocks import Anchors, LossReport, SoftmaxHeads, draft_blocks, encode_batch
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.loss_config import LossConfig
from draftsmith.stages.training.opd.loss import opd_loss
from draftsmith.stages.training.opd.verify_steps import verify_blocks
from draftsmith.stages.training.sft.trainer import sft_loss
from tests.stages.training.case import Case, blocks_of, heads_of, loss_context, make_case
from tests.stages.training.reference import Slow, assert_equal, slow_opd, slow_sft
from tests.testbed.dflash2 import random_dflash2


@pytest.fixture
def selecting(plain_target: Target) -> DFlash2Drafter:
    """Return a drafter whose gradients the test may take."""
    return random_dflash2(plain_target)


@pytest.fixture(scope="module")
def selector_case(plain_target: Target) -> Case:
    """Return a case in which some proposals and some of the answers' tokens are no candidates."""
    return make_case(plain_target, (2, 0))


SAMPLED = SamplingParams(0.8, 0.9)


@pytest.mark.parametrize(
    ("loss", "part", "sampling"),
    [
        ("cross_entropy", False, GREEDY),
        ("cross_entropy", True, SAMPLED),
        ("forward_kl", False, GREEDY),
        ("forward_kl", True, SAMPLED),
        ("bernoulli_kl", False, SAMPLED),
        ("tests.lab.losses:tv", True, SAMPLED),
        ("tests.lab.losses:lk", False, GREEDY),
        ("ce_l1", True, SAMPLED),
    ],
)
def test_sft_trains_the_head_and_the_selector(
    loss: Any,
    part: bool,
    sampling: SamplingParams,
    selector_case: Case,
    selecting: DFlash2Drafter,
    plain_target: Target,
) -> None:
    """part: softmaxes over every other token alone. sampling: of the tokens, which cross-entropy reads."""
    tokens = list(range(0, 64, 2)) if part else list(range(64))
    head = Head.over(plain_target.head_weight, torch.tensor(tokens))
    report = sft_loss(
        selecting,
        selector_case.batch,
        selector_case.anchors,
        loss_context(SoftmaxHeads(head, head, trained=False, selector=selecting), plain_target, sampling),
        SftConfig(gamma=3.0, loss=loss).stream(selecting.recipe),
        temperature=0.8,
    )
    slow = Slow.borrowing(selector_case, selecting, plain_target.head_weight, tokens)
    if loss == "cross_entropy":
        slow = replace(slow, head_temperature=sampling.temperature or 1.0)
    if loss == "ce_l1":
        slow = replace(slow, token_temperature=sampling.temperature or 1.0)
    expected, positions, accuracy = slow_sft(slow, loss, float(torch.tensor(-1 / 3.0).exp()), 0.8)
    assert_equal(report, expected, selecting)
    assert report.positions == positions
    assert report.metrics["accuracy"] == pytest.approx(accuracy)


OBJECTIVES: dict[str, Any] = {
    "paper": "paper",
    "other weights": {
        "response": {"loss": "tests.lab.losses:lk", "scope": "committed", "beyond": 1.5, "choice": 0.4, "weight": 0.5},
        "rejected": {"loss": "k3", "weight": 2.0},
    },
    "D-PACE's weights": {"response": {"loss": "cross_entropy", "scope": "block", "positions": {"kind": "d_pace"}}},
}


def opd(case: Case, drafter: DFlash2Drafter, target: Target, objective: LossConfig) -> LossReport:
    context = loss_context(heads_of(drafter, target), target)
    return opd_loss(blocks_of(case, drafter), context, objective, case.steps)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_opd_reads_the_selectors_distribution(
    name: str, selector_case: Case, selecting: DFlash2Drafter, plain_target: Target
) -> None:
    """After the answer's tokens in the response stream, after its own proposals in the rejected one."""
    objective = LossConfig.model_validate(OBJECTIVES[name]).resolved(selecting.recipe, False, 0.0)
    report = opd(selector_case, selecting, plain_target, objective)
    expected, positions = slow_opd(Slow.borrowing(selector_case, selecting, plain_target.head_weight), objective)
    assert_equal(report, expected, selecting)
    assert report.positions == positions


def test_verify_steps_are_those_of_its_proposals(
    selector_case: Case, selecting: DFlash2Drafter, plain_target: Target
) -> None:
    """The answer decides what is accepted; proposals after a rejection depend on its own tokens."""
    case, head = selector_case, Head(plain_target.head_weight)
    likely = selecting.propose(*_propose_arguments(case, selecting), head)
    tokens = case.batch.tokens.clone()
    for b in range(len(tokens)):  # answers that accept some of some blocks
        for a, anchor in enumerate(case.anchors.positions[b].tolist()):
            tokens[b, anchor + 1 : anchor + 1 + a % 3] = likely[b, a, : len(tokens[b, anchor + 1 : anchor + 1 + a % 3])]
    batch = type(case.batch)(
        [
            type(t)(t.trajectory_id, tokens[b, : len(t.tokens)].tolist(), t.prompt_length)
            for b, t in enumerate(case.trajectories)
        ],
        tokens,
        case.batch.features,
        case.batch.hidden,
        case.batch.positions,
    )
    changed = Case(batch, case.anchors, case.steps, batch.trajectories)
    with torch.no_grad():
        blocks = draft_blocks(selecting, encode_batch(selecting, batch), batch, case.anchors)
    steps = verify_blocks(blocks, heads_of(selecting, plain_target), proposals=4)
    proposed = selecting.propose(*_propose_arguments(changed, selecting), head)
    assert torch.equal(steps.proposed, proposed)
    accepted = set()
    for row, index, anchor in changed.blocks():
        following = batch.trajectories[row].tokens[anchor + 1 :]
        n = 0
        while n < min(4, len(following)) and following[n] == int(proposed[row, index, n]):
            n += 1
        assert int(steps.accepted[row, index]) == n
        accepted.add(n)
    assert len(accepted) > 2


def _propose_arguments(case: Case, selecting: DFlash2Drafter) -> tuple[Any, torch.Tensor, torch.Tensor, int]:
    anchors: Anchors = case.anchors
    with torch.no_grad():
        context = encode_batch(selecting, case.batch)
    return context, case.batch.tokens.gather(1, anchors.positions), anchors.positions, selecting.block_size
