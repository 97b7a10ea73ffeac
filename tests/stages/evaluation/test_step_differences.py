"""Diagnosis: an engine with one error is identified by its steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from draftsmith.artifacts.results.evaluation import DiagnosisResult
from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.dflash.model import DFlashDrafter, FeatureContext
from draftsmith.stages.engines.base import recorded_table
from draftsmith.stages.evaluation.diagnosis.body import ServedAnswers, diagnose
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.bench import Bench
from tests.testbed import native
from tests.testbed.mtp import native_head

ALLOWED = 0.1
WINDOW, BLOCK = 16, 4
PROMPTS, TOKENS = 5, 40  # windows are replayed block by block: no more than tells the changes apart


class Forgetful(DFlashDrafter):
    """Sees only the last positions of its context."""

    def block_hidden(self, context: Context, tokens: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        assert isinstance(context, FeatureContext)
        return super().block_hidden(FeatureContext(context.layers, WINDOW), tokens, anchors)


def with_attribute(name: str, value: Any) -> Callable[[Drafter], Drafter]:
    def changed(drafter: Drafter) -> Drafter:
        other = copy.deepcopy(drafter)
        setattr(other, name, value)
        return other

    return changed


def with_theta(theta: float) -> Callable[[Drafter], Drafter]:
    def changed(drafter: Any) -> Drafter:
        other = copy.deepcopy(drafter)
        other.config.rope_parameters = {**other.config.rope_parameters, "rope_theta": theta}
        other.rotary = type(other.rotary)(other.config)
        return other

    return changed


def forgetful(drafter: Drafter) -> Drafter:
    other = copy.deepcopy(drafter)
    other.__class__ = Forgetful
    return other


def serve(bench: Bench, drafter: Drafter, *, recorded: bool = True, **drafting: int) -> ServedAnswers:
    wrong = Bench(bench.target, {"wrong": drafter}, bench.prompts, bench.greedy)
    requests = wrong.requests(PROMPTS, TOKENS)
    answers = list(wrong.answers(requests, "wrong", slots=1, **drafting).values())
    answers = [answer for answer in answers if len(answer.response_ids) > 1]
    steps = recorded_table(answers) if recorded else None
    return ServedAnswers(
        [answer.trajectory() for answer in answers], [answer.verify_steps for answer in answers], steps
    )


def found(bench: Bench, served: ServedAnswers) -> DiagnosisResult:
    return diagnose(bench.target, bench.drafters["trained"], served, allowed=ALLOWED)


def test_correct_serving_agrees_with_replay(bench: Bench) -> None:
    diagnosis = found(bench, serve(bench, bench.drafters["trained"]))
    assert (
        diagnosis.agrees and diagnosis.as_it_is is not None and diagnosis.as_it_is.mismatch == 0 and not diagnosis.tried
    )
    assert diagnosis.served_tau == pytest.approx(diagnosis.as_it_is.tau)
    assert "drafts as replay does" in diagnosis.sentence


@pytest.mark.parametrize(
    ("cause", "wrong", "text"),
    [
        ("other layer ids", None, "in reverse order"),
        ("other rotary settings", with_theta(500_000.0), "rope_theta 500000 instead"),
        ("another mask token", with_attribute("mask_token_id", 0), "0 instead of"),
        ("truncated context", forgetful, f"sees {WINDOW} positions"),
    ],
)
def test_a_single_error_of_the_engine_is_named(
    bench: Bench, cause: str, wrong: Callable[[Drafter], Drafter] | None, text: str
) -> None:
    trained = bench.drafters["trained"]
    if wrong is None:
        wrong = with_attribute("target_layer_ids", list(trained.target_layer_ids)[::-1])
    diagnosis = found(bench, serve(bench, wrong(trained)))
    assert not diagnosis.agrees and diagnosis.as_it_is is not None and diagnosis.as_it_is.mismatch > ALLOWED
    assert {each.cause for each in diagnosis.causes} == {cause}, diagnosis
    assert text in diagnosis.sentence and diagnosis.causes[0].mismatch == 0
    assert diagnosis.causes[0].tau == pytest.approx(diagnosis.served_tau)


def test_a_native_head_that_is_fed_as_another_engine_does_is_named(bench: Bench, tmp_path: Path) -> None:
    """Fed back before its own norm. With weights near one that norm changes no proposal, so it gets others."""
    target = Target.load(native.target_with_head(tmp_path), device="cpu")
    head = native_head(target)
    with torch.no_grad():
        head.norm.weight.mul_(torch.linspace(0.2, 2, len(head.norm.weight)))
    with_head = replace(bench, target=target, drafters={"trained": head})
    wrong = with_attribute("reading", replace(head.reading, own_normed=False))
    diagnosis = found(with_head, serve(with_head, wrong(head)))
    assert {each.cause for each in diagnosis.causes} == {"other inputs of the head"}, diagnosis
    assert "without the head's norm on its own states" in diagnosis.sentence and diagnosis.causes[0].mismatch == 0
    assert {"other layer ids", "other rotary settings"} <= {each.cause for each in diagnosis.tried or ()}


def test_blocks_of_another_size_are_named(bench: Bench) -> None:
    served = serve(bench, bench.drafters["trained"], block_size=BLOCK)
    diagnosis = found(bench, replace(served, block_size=BLOCK))
    assert [each.cause for each in diagnosis.causes] == ["another block size"]
    assert diagnosis.causes[0].mismatch == 0


def test_another_checkpoint_is_explained_by_no_change(bench: Bench) -> None:
    diagnosis = found(bench, serve(bench, bench.drafters["untrained"]))
    assert not diagnosis.agrees and not diagnosis.causes
    assert "another checkpoint" in diagnosis.sentence


def test_counted_steps_are_enough_for_a_diagnosis(bench: Bench) -> None:
    """A server that records no steps still counts them for each answer."""
    trained = bench.drafters["trained"]
    diagnosis = found(bench, serve(bench, with_attribute("mask_token_id", 0)(trained), recorded=False))
    assert "another mask token" in {each.cause for each in diagnosis.causes}
    assert found(bench, serve(bench, trained, recorded=False)).agrees
