"""Losses of SFT and OPD against loops over rows, anchors and offsets: value, gradient and counts.

Of a parallel drafter that borrows the target's head, of an autoregressive one whose head is its own (EAGLE-3), and of
one with a selector (DFlash2).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.drafters.dflash2.model import DFlash2Drafter
from draftsmith.stages.drafters.dspark.model import DSparkDrafter
from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from draftsmith.stages.training.batches import Batch
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.drafted_blocks import draft_blocks, encode_batch, hidden_on_proposals
from draftsmith.stages.training.loss_registry import LossConfig, PositionWeights
from draftsmith.stages.training.loss_report import LossReport
from draftsmith.stages.training.opd.step import changed_ratio, opd_loss, opd_response
from draftsmith.stages.training.opd.verify_steps import verify_blocks
from draftsmith.stages.training.sft.body import sft_loss
from draftsmith.stages.training.softmax_heads import SoftmaxHeads
from tests.stages.training.case import Case, K, blocks_of, heads_of, loss_context, make_case
from tests.stages.training.reference import LK, TV, Slow, assert_equal, slow_opd, slow_sft
from tests.testbed.architectures import RANDOM
from tests.testbed.eagle3 import random_eagle3

SAMPLED = SamplingParams(0.8, 0.9)


@pytest.fixture(scope="module")
def cases(case: Case, plain_target: Target, plain_eagle3: Eagle3Drafter) -> dict[str, Case]:
    """Return the case with each drafter's features. Most proposals are EAGLE-3's own tokens; some are no candidates."""
    of_eagle = make_case(plain_target, plain_eagle3.target_layer_ids)
    generator = torch.Generator().manual_seed(5)
    shape = of_eagle.steps.proposed.shape
    own = plain_eagle3.draft_tokens[torch.randint(0, plain_eagle3.draft_tokens.numel(), shape, generator=generator)]
    replaced = torch.rand(shape, generator=generator) < 0.8
    steps = replace(of_eagle.steps, proposed=torch.where(replaced, own, of_eagle.steps.proposed))
    return {"dflash": case, "eagle3": replace(of_eagle, steps=steps), "dflash2": case}


def heads(drafter: Drafter, target: Target, tokens: list[int] | None) -> SoftmaxHeads:
    """Return heads over some tokens of the target's, or over all that the drafter can propose."""
    if tokens is None:
        return heads_of(drafter, target)
    head = Head.over(target.head_weight, torch.tensor(tokens))
    return SoftmaxHeads(head, head, trained=False, selector=drafter if drafter.has_selector else None)


def slowly(case: Case, drafter: Drafter, target: Target, tokens: list[int] | None) -> Slow:
    if isinstance(drafter, Eagle3Drafter):
        return Slow.owning(case, drafter, target.head_weight)
    return Slow.borrowing(case, drafter, target.head_weight, tokens)


# ---- SFT


def sft(
    case: Case, drafter: Drafter, target: Target, tokens: list[int] | None = None, sampling: Any = GREEDY,
    temperature: float = 1.0, **fields: Any,
) -> LossReport:  # fmt: skip
    """sampling: of the tokens, which cross-entropy reads. temperature: of the target's distribution."""
    context = loss_context(heads(drafter, target, tokens), target, sampling)
    stream = SftConfig.model_validate(fields).stream(drafter.recipe)
    return sft_loss(drafter, case.batch, case.anchors, context, stream, temperature=temperature)


@pytest.mark.parametrize("part", [False, True])
@pytest.mark.parametrize("gamma", [2.0, 7.0])
def test_sft_trains_the_answers_tokens(gamma: float, part: bool, cases: dict[str, Case], plain_target: Target) -> None:
    drafter, tokens = RANDOM["dflash"](plain_target), list(range(0, 64, 2 if part else 1))
    report = sft(cases["dflash"], drafter, plain_target, tokens, gamma=gamma)
    expected = slow_sft(slowly(cases["dflash"], drafter, plain_target, tokens), "cross_entropy", math.exp(-1 / gamma))
    assert_as_expected(report, expected, drafter, cases["dflash"])


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sft_of_eagle3_is_the_training_time_test(
    temperature: float, cases: dict[str, Case], plain_target: Target
) -> None:
    """Forward KL to the target's distribution over the draft vocabulary, 0.8 a step, on the trajectory's own tokens."""
    drafter, case = random_eagle3(plain_target), cases["eagle3"]
    report = sft(case, drafter, plain_target, temperature=temperature)
    expected = slow_sft(slowly(case, drafter, plain_target, None), "forward_kl", 0.8, temperature)
    assert_as_expected(report, expected, drafter, case)
    ends = ((len(case.trajectories[row].tokens), anchor) for row, _, anchor in case.blocks())
    inside = sum(min(K, length - 1 - anchor) for length, anchor in ends)
    assert report.positions < inside - 5, "tokens outside the draft vocabulary are skipped"

    outside = next(t for t in range(64) if t not in drafter.draft_tokens.tolist())
    nothing = replace(case.batch, tokens=torch.full_like(case.batch.tokens, outside))
    report = sft(replace(case, batch=nothing), drafter, plain_target)
    assert (float(report.loss.detach()), report.positions) == (0.0, 0), "possible with a small vocabulary"
    report.loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in drafter.parameters())


@pytest.mark.parametrize(
    ("loss", "part", "sampling"),
    [
        ("cross_entropy", False, GREEDY),
        ("cross_entropy", True, SAMPLED),
        ("forward_kl", False, GREEDY),
        ("forward_kl", True, SAMPLED),
        ("bernoulli_kl", False, SAMPLED),
        (TV, True, SAMPLED),
        (LK, False, GREEDY),
        ("ce_l1", True, SAMPLED),
    ],
)
def test_sft_trains_the_head_and_the_selector(
    loss: Any, part: bool, sampling: SamplingParams, cases: dict[str, Case], plain_target: Target
) -> None:
    """part: softmaxes over only every other token."""
    drafter, case, tokens = RANDOM["dflash2"](plain_target), cases["dflash2"], list(range(0, 64, 2 if part else 1))
    report = sft(case, drafter, plain_target, tokens, sampling, temperature=0.8, gamma=3.0, loss=loss)
    slow = slowly(case, drafter, plain_target, tokens)
    if loss == "cross_entropy":
        slow = replace(slow, head_temperature=sampling.temperature or 1.0)
    if loss == "ce_l1":
        slow = replace(slow, token_temperature=sampling.temperature or 1.0)
    assert_as_expected(report, slow_sft(slow, loss, math.exp(-1 / 3.0), 0.8), drafter, case)


def assert_as_expected(
    report: LossReport, expected: tuple[torch.Tensor, int, float], drafter: Drafter, case: Case
) -> None:
    loss, positions, accuracy = expected
    assert_equal(report, loss, drafter)
    assert (report.blocks, report.positions) == (len(case.blocks()), positions)
    assert report.metrics["accuracy"] == pytest.approx(accuracy)


# ---- OPD


def resolved(value: Any = "matched", *, sampled: bool = False, temperature: float = 0.0) -> LossConfig:
    return LossConfig.model_validate(value).resolved(DFlashDrafter.recipe, sampled, temperature)


def response(loss: str, **fields: Any) -> dict[str, Any]:
    """Return a stream on only committed offsets, unless `fields` say otherwise."""
    return {"response": {"loss": loss, "scope": "committed", "beyond": 0} | fields}


OBJECTIVES = {
    "matched greedy": resolved(),
    "matched greedy, committed": resolved(response("auto")),
    "matched sampled": resolved({"response": {"weight": 0.5}}, sampled=True, temperature=0.7),
    "paper": resolved("paper"),
    "paper, each stream a mean": resolved({"preset": "paper", "pooled": False}),
    "paper, other weights": resolved(
        {
            "preset": "paper",
            "response": {"weight": 0.3},
            "rejected": {"weight": 2.0, "offsets": 2, "positions": {"kind": "power", "delta": 0.5}},
        },
        sampled=True,
    ),
    "rejected stream, exponential weights": resolved(
        {"rejected": {"loss": "k3", "positions": {"kind": "exponential", "gamma": 2.0}}}
    ),
    "forward KL of the argmax": resolved(response("forward_kl") | {"temperature": 0}),
    "forward KL of a sharpened target": resolved(response("forward_kl") | {"temperature": 0.3}),
    "TV": resolved(response(TV, scope="block"), sampled=True, temperature=0.8),
    "TV of the argmax": resolved(response(TV) | {"temperature": 0}),
    "LK": resolved(response(LK), sampled=True, temperature=1.3),
    "LK of the argmax": resolved(response(LK) | {"temperature": 0}),
    "whole blocks, as SFT": resolved(
        response("cross_entropy", scope="block", positions={"kind": "exponential", "gamma": 2.0})
    ),
    "beyond the correction": resolved(response("forward_kl", beyond=1.5), sampled=True, temperature=1.0),
    "beyond the correction, with power weights": resolved(
        response("cross_entropy", beyond=0.5, positions={"kind": "power", "delta": 0.6})
    ),
    "power weights": resolved(response("forward_kl", positions={"kind": "power", "delta": 0.6})),
    "D-PACE": resolved(response("cross_entropy", scope="block", positions={"kind": "d_pace"})),
    "D-PACE, committed": resolved(response(LK, positions={"kind": "d_pace"})),
}
OF_EAGLE3: dict[str, Any] = {  # the response stream on the trajectory's tokens, the rejected one on the drafter's own
    "EAGLE-3, matched": "matched",
    "EAGLE-3, paper": "paper",
    "EAGLE-3, paper, each stream a mean": {"preset": "paper", "pooled": False},
    "EAGLE-3, forward KL, rejected stream of another weight": response("forward_kl", scope="block", weight=0.5)
    | {"rejected": {"loss": "k3", "weight": 2.0, "positions": {"kind": "power", "delta": 0.5}}},
}
OF_A_SELECTOR: dict[str, Any] = {  # its distribution: after the answer's tokens, and after its own proposals
    "selector, paper": "paper",
    "selector, other weights": response(LK, beyond=1.5, choice=0.4, weight=0.5)
    | {"rejected": {"loss": "k3", "weight": 2.0}},
    "selector, D-PACE's weights": response("cross_entropy", scope="block", positions={"kind": "d_pace"}),
}
CASES: dict[str, tuple[str, LossConfig]] = {
    **{name: ("dflash", objective) for name, objective in OBJECTIVES.items()},
    **{f"{name}, of some tokens": ("dflash", objective) for name, objective in OBJECTIVES.items()},
    **{
        name: (kind, LossConfig.model_validate(value).resolved(recipe, False, 0.0))
        for kind, recipe, objectives in (
            ("eagle3", Eagle3Drafter.recipe, OF_EAGLE3),
            ("dflash2", DFlash2Drafter.recipe, OF_A_SELECTOR),
        )
        for name, value in objectives.items()
    },
}


def opd(
    case: Case, drafter: Drafter, target: Target, objective: LossConfig, tokens: list[int] | None = None
) -> LossReport:
    blocks = blocks_of(case, drafter)
    if drafter.autoregressive:
        states = hidden_on_proposals(drafter, encode_batch(drafter, case.batch), blocks, case.steps.proposed)
        blocks = replace(blocks, on_proposals=states)
    context = loss_context(heads(drafter, target, tokens), target)
    response = opd_response(blocks, context, objective, case.steps)
    return opd_loss(response, blocks, context, objective, case.steps)


@pytest.mark.parametrize("name", CASES)
def test_opd_loss_equals_the_loop(name: str, cases: dict[str, Case], plain_target: Target) -> None:
    kind, objective = CASES[name]
    drafter, case = RANDOM[kind](plain_target), cases[kind]
    tokens = list(range(0, 64, 3)) if name.endswith("of some tokens") else None
    report = opd(case, drafter, plain_target, objective, tokens)
    slow, positions = slow_opd(slowly(case, drafter, plain_target, tokens), objective)
    assert_equal(report, slow, drafter)
    assert (report.blocks, report.positions) == (len(case.blocks()), positions)
    assert not plain_target.head_weight.requires_grad and not case.batch.features.requires_grad


def test_the_default_follows_the_verification_rule() -> None:
    greedy, sampled = resolved(), resolved(sampled=True, temperature=0.6)
    assert (greedy.response.loss, sampled.response.loss, sampled.temperature) == ("cross_entropy", "forward_kl", 0.6)
    for found in (greedy, sampled):
        assert (found.response.scope, found.response.beyond) == ("committed", 1.0)
        assert found.response.weights() == PositionWeights(kind="uniform")
    assert resolved({"response": {"beyond": 0}}).response.beyond == 0.0
    block = resolved({"response": {"scope": "block"}}).response
    assert (block.weights(), block.beyond) == (PositionWeights(kind="exponential", gamma=7.0), 0.0)  # as in SFT
    for rule in (True, False):  # what reads the distribution in SFT continues so
        stream = LossConfig().resolved(Eagle3Drafter.recipe, rule, float(rule)).response
        assert (stream.loss, stream.scope) == ("forward_kl", "block")
        stream = LossConfig().resolved(DSparkDrafter.recipe, rule, float(rule)).response
        assert (stream.loss, stream.scope) == ("ce_l1", "block")
        assert stream.weights() == PositionWeights(kind="exponential", gamma=4.0)
    named = LossConfig.model_validate({"response": {"beyond": 0}}).resolved(Eagle3Drafter.recipe, False, 0.0).response
    assert (named.scope, named.beyond) == ("committed", 0.0)
    assert resolved(sampled=True, temperature=0.0).temperature == 1.0  # greedy answers, to be served sampled
    assert not greedy.needs_scores
    chosen = resolved(response(LK) | {"temperature": 0.2}, sampled=True, temperature=0.6)
    assert (chosen.response.loss, chosen.temperature) == (LK, 0.2)


def test_without_rejections_the_paper_has_its_response_stream_alone(
    case: Case, plain_drafter: DFlashDrafter, plain_target: Target
) -> None:
    steps = replace(case.steps, accepted=case.steps.judged)
    report = opd(replace(case, steps=steps), plain_drafter, plain_target, OBJECTIVES["paper"])
    assert report.metrics["loss_rejected"] == 0
    assert float(report.loss.detach()) == pytest.approx(report.metrics["loss_response"])


def test_steps_that_changed_are_counted(case: Case, plain_drafter: DFlashDrafter, plain_target: Target) -> None:
    """They are counted against the drafter's own argmax at every trained anchor."""
    slow, now = Slow.borrowing(case, plain_drafter, plain_target.head_weight), {}
    for row, index, anchor in case.blocks():
        tokens = case.trajectories[row].tokens[anchor + 1 :]
        now[row, index] = hits(slow.log_q(row, anchor).argmax(-1).tolist(), tokens)
    different = [int(case.steps.accepted[at]) != accepted for at, accepted in now.items()]
    assert sum(different) > 0
    blocks, context = blocks_of(case, plain_drafter), loss_context(heads_of(plain_drafter, plain_target), plain_target)

    def changed(steps: Steps[torch.Tensor]) -> float:
        return changed_ratio(steps, opd_response(blocks, context, OBJECTIVES["matched greedy"], steps).correct)

    assert changed(case.steps) == pytest.approx(sum(different) / len(different))
    verified = replace(case.steps, accepted=case.steps.accepted.clone())
    for (row, index), accepted in now.items():
        verified.accepted[row, index] = accepted
    assert changed(verified) == 0


def hits(proposed: list[int], following: list[int]) -> int:
    """Return how many proposals are accepted."""
    same = [a == b for a, b in zip(proposed, following, strict=False)]
    return same.index(False) if False in same else len(same)


@torch.no_grad()
def test_verify_steps_of_a_selector_are_those_of_its_proposals(case: Case, plain_target: Target) -> None:
    """The answer decides what is accepted; proposals after a rejection depend on its own tokens."""
    drafter, anchors = RANDOM["dflash2"](plain_target), case.anchors

    def proposed(batch: Batch) -> torch.Tensor:
        at = batch.tokens.gather(1, anchors)
        return drafter.propose(encode_batch(drafter, batch), at, anchors, 5, Head(plain_target.head_weight))

    tokens, likely = case.batch.tokens.clone(), proposed(case.batch)
    for row, index, anchor in case.blocks():  # answers that accept some of some blocks
        end = min(anchor + 1 + index % 3, tokens.shape[1])
        tokens[row, anchor + 1 : end] = likely[row, index, : end - anchor - 1]
    texts = [replace(t, tokens=tokens[row, : len(t.tokens)].tolist()) for row, t in enumerate(case.trajectories)]
    batch = replace(case.batch, trajectories=texts, tokens=tokens)
    blocks = draft_blocks(drafter, encode_batch(drafter, batch), batch, anchors)
    steps, own = verify_blocks(blocks, heads_of(drafter, plain_target), proposals=K), proposed(batch)
    assert torch.equal(steps.proposed, own)
    expected = {
        (row, index): hits(own[row, index].tolist(), texts[row].tokens[anchor + 1 :])
        for row, index, anchor in case.blocks()
    }
    assert {at: int(steps.accepted[at]) for at in expected} == expected
    assert len(set(expected.values())) > 2
