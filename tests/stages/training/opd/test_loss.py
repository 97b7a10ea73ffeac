"""OPD's loss against a loop over rows, anchors and offsets: value, gradient and counts, for every loss and weight."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.drafters.dspark.model import DSparkDrafter
from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.training.blocks import LossReport, SoftmaxHeads
from draftsmith.stages.training.loss_config import LossConfig, PositionWeights
from draftsmith.stages.training.opd.loss import opd_loss
from draftsmith.stages.training.opd.verify_steps import VerifySteps
from tests.stages.training.case import Case, K, blocks_of, loss_context
from tests.stages.training.reference import Slow, assert_equal, slow_opd


def objective(value: Any = "matched", *, sampled: bool = False, temperature: float = 0.0) -> LossConfig:
    return LossConfig.model_validate(value).resolved(DFlashDrafter.recipe, sampled, temperature)


def response(loss: str, **fields: Any) -> dict[str, Any]:
    """Return a stream on committed offsets alone, unless `fields` say otherwise."""
    return {"response": {"loss": loss, "scope": "committed", "beyond": 0} | fields}


OBJECTIVES = {
    "matched greedy": objective(),
    "matched greedy, committed": objective(response("auto")),
    "matched sampled": objective({"response": {"weight": 0.5}}, sampled=True, temperature=0.7),
    "paper": objective("paper"),
    "paper, other weights": objective(
        {
            "preset": "paper",
            "response": {"weight": 0.3},
            "rejected": {"weight": 2.0, "positions": {"kind": "power", "delta": 0.5}},
        },
        sampled=True,
    ),
    "rejected stream, exponential weights": objective(
        {"rejected": {"loss": "k3", "positions": {"kind": "exponential", "gamma": 2.0}}}
    ),
    "forward KL of the argmax": objective(response("forward_kl") | {"temperature": 0}),
    "forward KL of a sharpened target": objective(response("forward_kl") | {"temperature": 0.3}),
    "TV": objective(response("tests.lab.losses:tv", scope="block"), sampled=True, temperature=0.8),
    "TV of the argmax": objective(response("tests.lab.losses:tv") | {"temperature": 0}),
    "LK": objective(response("tests.lab.losses:lk"), sampled=True, temperature=1.3),
    "LK of the argmax": objective(response("tests.lab.losses:lk") | {"temperature": 0}),
    "whole blocks, as SFT": objective(
        response("cross_entropy", scope="block", positions={"kind": "exponential", "gamma": 2.0})
    ),
    "beyond the correction": objective(response("forward_kl", beyond=1.5), sampled=True, temperature=1.0),
    "beyond the correction, with power weights": objective(
        response("cross_entropy", beyond=0.5, positions={"kind": "power", "delta": 0.6})
    ),
    "power weights": objective(response("forward_kl", positions={"kind": "power", "delta": 0.6})),
    "D-PACE": objective(response("cross_entropy", scope="block", positions={"kind": "d_pace"})),
    "D-PACE, committed": objective(response("tests.lab.losses:lk", positions={"kind": "d_pace"})),
}


def opd(
    case: Case,
    drafter: DFlashDrafter,
    target: Target,
    objective: LossConfig,
    tokens: list[int] | None = None,
) -> LossReport:
    head = Head.over(target.head_weight, None if tokens is None else torch.tensor(tokens))
    context = loss_context(SoftmaxHeads(head, head, trained=False), target)
    return opd_loss(blocks_of(case, drafter), context, objective, case.steps)


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("part", [False, True])
def test_opd_loss_equals_the_loop(
    name: str, part: bool, case: Case, drafter: DFlashDrafter, plain_target: Target
) -> None:
    tokens = list(range(0, 64, 3)) if part else list(range(64))
    report = opd(case, drafter, plain_target, OBJECTIVES[name], tokens)
    slow, positions = slow_opd(Slow.borrowing(case, drafter, plain_target.head_weight, tokens), OBJECTIVES[name])
    assert_equal(report, slow, drafter)
    assert (report.blocks, report.positions) == (len(case.blocks()), positions)


def test_the_default_follows_the_verification_rule() -> None:
    greedy, sampled = objective(), objective(sampled=True, temperature=0.6)
    assert (greedy.response.loss, sampled.response.loss, sampled.temperature) == ("cross_entropy", "forward_kl", 0.6)
    for resolved in (greedy, sampled):
        assert (resolved.response.scope, resolved.response.beyond) == ("committed", 1.0)
        assert resolved.response.weights() == PositionWeights(kind="uniform")
    assert objective({"response": {"beyond": 0}}).response.beyond == 0.0
    block = objective({"response": {"scope": "block"}}).response
    assert (block.weights(), block.beyond) == (PositionWeights(kind="exponential", gamma=7.0), 0.0)  # as in SFT
    for rule in (True, False):  # what reads the distribution in SFT continues so
        stream = LossConfig().resolved(Eagle3Drafter.recipe, rule, float(rule)).response
        assert (stream.loss, stream.scope) == ("forward_kl", "block")
        stream = LossConfig().resolved(DSparkDrafter.recipe, rule, float(rule)).response
        assert (stream.loss, stream.scope) == ("ce_l1", "block")
        assert stream.weights() == PositionWeights(kind="exponential", gamma=4.0)
    named = LossConfig.model_validate({"response": {"beyond": 0}}).resolved(Eagle3Drafter.recipe, False, 0.0).response
    assert (named.scope, named.beyond) == ("committed", 0.0)
    assert objective(sampled=True, temperature=0.0).temperature == 1.0  # greedy answers, to be served sampled
    assert not greedy.needs_scores
    chosen = objective(response("tests.lab.losses:lk") | {"temperature": 0.2}, sampled=True, temperature=0.6)
    assert (chosen.response.loss, chosen.temperature) == ("tests.lab.losses:lk", 0.2)


def test_without_rejections_the_paper_has_its_response_stream_alone(
    case: Case, plain_drafter: DFlashDrafter, plain_target: Target
) -> None:
    steps = replace(case.steps, rejected_offset=torch.zeros_like(case.steps.rejected_offset))
    report = opd(replace(case, steps=steps), plain_drafter, plain_target, OBJECTIVES["paper"])
    assert report.metrics["loss_rejected"] == 0
    assert float(report.loss.detach()) == pytest.approx(report.metrics["loss_response"])


def test_steps_that_changed_are_counted(case: Case, plain_drafter: DFlashDrafter, plain_target: Target) -> None:
    """They are counted against the drafter's own argmax at every trained anchor."""
    slow, now = Slow.borrowing(case, plain_drafter, plain_target.head_weight), {}
    for row, index, anchor in case.blocks():
        tokens = case.trajectories[row].tokens[anchor + 1 :]
        proposed = slow.log_q(row, anchor).argmax(-1).tolist()
        hits = [a == b for a, b in zip(proposed, tokens, strict=False)]
        now[row, index] = hits.index(False) if False in hits else len(hits)
    different = [int(case.steps.accepted[at]) != accepted for at, accepted in now.items()]
    assert sum(different) > 0
    report = opd(case, plain_drafter, plain_target, OBJECTIVES["matched greedy"])
    assert report.metrics["steps_changed_share"] == pytest.approx(sum(different) / len(different))
    verified = VerifySteps(*(x.clone() for x in vars(case.steps).values()))
    for (row, index), accepted in now.items():
        length = len(case.trajectories[row].tokens) - 1 - int(case.anchors.positions[row, index])
        verified.accepted[row, index], verified.committed[row, index] = accepted, min(accepted + 1, length)
        verified.rejected_offset[row, index] = accepted + 1 if accepted < min(K, length) else 0
    report = opd(replace(case, steps=verified), plain_drafter, plain_target, OBJECTIVES["matched greedy"])
    assert report.metrics["steps_changed_share"] == 0


def test_the_target_gets_no_gradient(case: Case, drafter: DFlashDrafter, plain_target: Target) -> None:
    for kind in OBJECTIVES.values():
        opd(case, drafter, plain_target, kind).loss.backward()
    assert plain_target.head_weight.grad is None
    assert not case.batch.features.requires_grad
