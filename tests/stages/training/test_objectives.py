"""SFT's and OPD's losses against loops over rows, anchors and offsets: value, gradient and counts.

The loops take the drafter's hidden states one block at a time (`test_model.py` holds those) and do the rest in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

from stages.drafters.dflash.model import DFlashDrafter
from stages.drafters.head import Head
from stages.replay.trace import Trajectory
from stages.targets.causal_lm import Target
from stages.training.anchors import pad_anchors
from stages.training.batches import Batch, FeatureSource
from stages.training.objectives import Anchors, LossReport, MinedSteps, OpdObjective, opd_loss, sft_loss
from tests.stages.training.test_losses import plain_bernoulli, plain_k3
from tests.testbed import random_target

K = 4  # proposals of the plain drafter's block
CHUNK = 5  # many chunks, the last one smaller
TOLERANCE = 1e-4


@dataclass
class Case:
    """Three trajectories with anchors up to their ends, one of them short of anchors, and steps that fit them."""

    batch: Batch
    anchors: Anchors
    mined: MinedSteps
    trajectories: list[Trajectory]

    def blocks(self) -> list[tuple[int, int, int]]:
        """(row, index of the anchor, its position) of the real anchors."""
        valid, positions = self.anchors.valid.tolist(), self.anchors.positions.tolist()
        return [(b, a, positions[b][a]) for b in range(len(valid)) for a in range(len(valid[b])) if valid[b][a]]


@pytest.fixture(scope="module")
def case(plain_target: Target, plain_drafter: DFlashDrafter) -> Case:
    trajectories = random_target.trajectories(3, seed=11)
    source = FeatureSource(plain_target, plain_drafter.target_layer_ids, trajectories)
    rng = np.random.default_rng(0)
    chosen = [
        np.array([t.first_anchor, t.first_anchor + 3, t.last_anchor - 2, t.last_anchor - 1, t.last_anchor])
        for t in trajectories
    ]
    chosen[1] = chosen[1][[1, 4]]
    anchors = pad_anchors(chosen, torch.device("cpu"))
    shape = tuple(anchors.positions.shape)
    committed, rejected_offset = np.zeros(shape, int), np.zeros(shape, int)
    logprobs = rng.uniform(-14, -0.01, (*shape, K)).astype(np.float32)  # some below the floor
    for b, t in enumerate(trajectories):
        for a, anchor in enumerate(anchors.positions[b].tolist()):
            judged = min(K, len(t.tokens) - 1 - anchor)
            accepted = (b + a) % (judged + 1)  # all kinds: nothing, a part, everything, cut by the end
            committed[b, a] = min(accepted + 1, len(t.tokens) - 1 - anchor)
            rejected_offset[b, a] = accepted + 1 if accepted < judged else 0
            logprobs[b, a, judged:] = np.nan
    assert (rejected_offset == 0).any()
    assert (rejected_offset > 1).any()
    proposed = rng.integers(0, random_target.TEXT_TOKENS, (*shape, K))
    mined = MinedSteps(*(torch.from_numpy(x) for x in (committed, rejected_offset, proposed, logprobs)))
    return Case(source.batch([0, 1, 2]), anchors, mined, trajectories)


@pytest.fixture
def drafter(plain_target: Target) -> DFlashDrafter:
    """One whose gradients the test may take."""
    return random_target.random_drafter(plain_target)


@dataclass
class Slow:
    """The drafter's and the target's distributions at one position, and sums that divide at the end."""

    case: Case
    drafter: DFlashDrafter
    weight: torch.Tensor  # [V, H]
    head_tokens: list[int] = field(default_factory=lambda: list(range(random_target.VOCAB_SIZE)))

    def log_q(self, row: int, anchor: int) -> torch.Tensor:
        """[K, V'] over the head's tokens, float64, with gradient; the context ends at the anchor."""
        batch, one = self.case.batch, slice(row, row + 1)
        context = self.drafter.encode(batch.features[one, :anchor], batch.positions[one, :anchor])
        token = torch.tensor([[self.case.trajectories[row].tokens[anchor]]])
        hidden = self.drafter.block_hidden(context, token, torch.tensor([[anchor]]), K + 1)[0, 0]
        return torch.log_softmax((hidden @ self.weight[self.head_tokens].T).double(), -1)

    def target_logits(self, row: int, position: int) -> torch.Tensor:
        """[V] logits of the token at `position`, read off the position before it."""
        return (self.weight @ self.case.batch.hidden[row, position - 1]).double()


def assert_equal(report: LossReport, slow: torch.Tensor, drafter: DFlashDrafter) -> None:
    """Same value and same gradient in every parameter."""
    torch.testing.assert_close(report.loss.detach().double(), slow.detach(), rtol=TOLERANCE, atol=TOLERANCE)
    parameters = list(drafter.parameters())
    fast = torch.autograd.grad(report.loss, parameters)
    for (name, _), a, b in zip(drafter.named_parameters(), fast, torch.autograd.grad(slow, parameters), strict=True):
        scale = float(b.abs().max())
        assert float((a - b).abs().max()) <= 1e-3 * scale + 1e-6, name


@pytest.mark.parametrize("gamma", [2.0, 7.0])
@pytest.mark.parametrize("part", [False, True])
def test_sft_loss_equals_the_loop(
    gamma: float, part: bool, case: Case, drafter: DFlashDrafter, plain_target: Target
) -> None:
    tokens = list(range(0, 64, 2)) if part else list(range(64))
    head = Head.over(plain_target.head_weight, torch.tensor(tokens))
    report = sft_loss(drafter, case.batch, case.anchors, head, gamma=gamma, positions_per_chunk=CHUNK)
    slow = Slow(case, drafter, plain_target.head_weight, tokens)
    total, weights, positions, correct = torch.zeros((), dtype=torch.float64), 0.0, 0, 0
    for row, _, anchor in case.blocks():
        log_q = slow.log_q(row, anchor)
        for k in range(1, K + 1):
            if anchor + k >= len(case.trajectories[row].tokens):
                continue
            label = case.trajectories[row].tokens[anchor + k]
            if label not in tokens:
                continue
            weight = math.exp(-(k - 1) / gamma)
            total = total - weight * log_q[k - 1, tokens.index(label)]
            weights += weight
            positions += 1
            correct += tokens[int(log_q[k - 1].argmax())] == label
    assert_equal(report, total / weights, drafter)
    assert (report.blocks, report.positions) == (len(case.blocks()), positions)
    assert report.figures["accuracy"] == pytest.approx(correct / positions)


def slow_opd(slow: Slow, objective: OpdObjective) -> tuple[torch.Tensor, int]:
    """The loss, and how many positions have one."""
    case, tokens = slow.case, slow.head_tokens
    response, count = torch.zeros((), dtype=torch.float64), 0
    rejected, weights = torch.zeros((), dtype=torch.float64), 0.0
    trained: set[tuple[int, int, int]] = set()
    for row, index, anchor in case.blocks():
        log_q = slow.log_q(row, anchor)
        for k in range(1, K + 1):
            if k > int(case.mined.committed[row, index]):
                continue
            label = case.trajectories[row].tokens[anchor + k]
            if label not in tokens:
                continue
            log_q_token = log_q[k - 1, tokens.index(label)]
            target_logits = slow.target_logits(row, anchor + k)
            if objective.loss == "paper":
                log_p = float(torch.log_softmax(target_logits, -1)[label])
                response = response + differentiable(plain_bernoulli, log_q_token, log_p)
            elif objective.sampled:
                log_p_all = torch.log_softmax(target_logits[tokens] / objective.temperature, -1)
                response = response + (log_p_all.exp() * (log_p_all - log_q[k - 1])).sum()
            else:
                response = response - log_q_token
            count += 1
            trained.add((row, index, k))
        first = int(case.mined.rejected_offset[row, index])
        for k in range(first, K + 1) if first and objective.loss == "paper" else ():
            log_p = float(case.mined.target_logprobs[row, index, k - 1])
            proposal = int(case.mined.proposed[row, index, k - 1])
            if math.isnan(log_p) or proposal not in tokens:
                continue
            weight = objective.delta ** (k - 1)
            rejected = rejected + weight * differentiable(plain_k3, log_q[k - 1, tokens.index(proposal)], log_p)
            weights += weight
            trained.add((row, index, k))
    loss = objective.weight_accepted * response / count
    if objective.loss == "paper":
        loss = loss + objective.weight_rejected * rejected / weights
    return loss, len(trained)


def differentiable(plain: object, log_q: torch.Tensor, log_p: float) -> torch.Tensor:
    """A plain function of two floats, with the slope in log_q by central difference."""
    at, step = float(log_q.detach()), 1e-6
    value = plain(at, log_p)  # type: ignore[operator]
    slope = (plain(at + step, log_p) - plain(at - step, log_p)) / (2 * step)  # type: ignore[operator]
    return value + slope * (log_q - at)


OBJECTIVES = {
    "matched greedy": OpdObjective("matched", sampled=False),
    "matched sampled": OpdObjective("matched", sampled=True, temperature=0.7, weight_accepted=0.5),
    "paper": OpdObjective("paper", sampled=False),
    "paper, other weights": OpdObjective("paper", sampled=True, delta=0.5, weight_accepted=0.3, weight_rejected=2.0),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("part", [False, True])
def test_opd_loss_equals_the_loop(
    name: str, part: bool, case: Case, drafter: DFlashDrafter, plain_target: Target
) -> None:
    tokens = list(range(0, 64, 3)) if part else list(range(64))
    head = Head.over(plain_target.head_weight, torch.tensor(tokens))
    report = opd_loss(
        drafter,
        case.batch,
        case.anchors,
        case.mined,
        head,
        plain_target.head_weight,
        OBJECTIVES[name],
        positions_per_chunk=CHUNK,
    )
    slow, positions = slow_opd(Slow(case, drafter, plain_target.head_weight, tokens), OBJECTIVES[name])
    assert_equal(report, slow, drafter)
    assert (report.blocks, report.positions) == (len(case.blocks()), positions)


def opd(case: Case, drafter: DFlashDrafter, target: Target, objective: OpdObjective) -> LossReport:
    head = Head(target.head_weight)
    return opd_loss(
        drafter,
        case.batch,
        case.anchors,
        case.mined,
        head,
        target.head_weight,
        objective,
        positions_per_chunk=CHUNK,
    )


def test_without_rejections_the_paper_has_its_response_stream_alone(
    case: Case, plain_drafter: DFlashDrafter, plain_target: Target
) -> None:
    mined = replace(case.mined, rejected_offset=torch.zeros_like(case.mined.rejected_offset))
    report = opd(replace(case, mined=mined), plain_drafter, plain_target, OBJECTIVES["paper"])
    assert report.figures["loss_rejected"] == 0
    assert float(report.loss.detach()) == pytest.approx(report.figures["loss_response"])


def test_padding_anchors_change_nothing(case: Case, plain_drafter: DFlashDrafter, plain_target: Target) -> None:
    def wider(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x[:, -1:]], 1)

    padded = Anchors(
        wider(case.anchors.positions), torch.cat([case.anchors.valid, torch.zeros(3, 1, dtype=torch.bool)], 1)
    )
    mined = MinedSteps(
        *(wider(getattr(case.mined, name)) for name in ("committed", "rejected_offset", "proposed", "target_logprobs"))
    )
    more = replace(case, anchors=padded, mined=mined)
    for objective in OBJECTIVES.values():
        first, second = (opd(c, plain_drafter, plain_target, objective) for c in (case, more))
        torch.testing.assert_close(first.loss, second.loss, rtol=1e-6, atol=1e-6)
        assert (first.blocks, first.positions) == (second.blocks, second.positions)


def test_the_target_gets_no_gradient(case: Case, drafter: DFlashDrafter, plain_target: Target) -> None:
    for objective in OBJECTIVES.values():
        opd(case, drafter, plain_target, objective).loss.backward()
    assert plain_target.head_weight.grad is None
    assert not case.batch.features.requires_grad
