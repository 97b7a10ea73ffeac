"""Commands that a shell and the `draftsmith` command take as they are printed."""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import pytest

from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.flows.cli.main import parser
from draftsmith.stages.report.review import review_of
from draftsmith.stages.report.tables import Step, next_steps, refresh_anyway
from draftsmith.stages.runtime.invocation import Invocation, invocation
from tests.stages.report.sample_report import DECISION, OF_A_LINE, rule, verdict

ASKED = Invocation("my configs/it's.yaml", ["sft.steps=3", "name=a b"], "weekly", "4")
SECONDS = {"evaluation": 120.0, "gate": 1.0}


def steps(found: Any = OF_A_LINE, asked: Invocation = ASKED, **changes: Any) -> list[Step]:
    evaluation, decision = EvaluationResult.model_validate(found), GateDecision.model_validate(DECISION | changes)
    return next_steps(review_of(evaluation, decision), asked, SECONDS)


@pytest.mark.parametrize("outcome", ["promoted", "refused", "inconclusive", "measured"])
def test_every_command_is_one(outcome: str) -> None:
    made = (
        steps(outcome=outcome, rules=[rule("tau", passed=False)])
        if outcome != "measured"
        else steps(asked=Invocation("a.yaml"))
    )
    assert made
    for step in [*made, refresh_anyway(ASKED)]:
        program, *arguments = shlex.split(step.command)
        assert program == "draftsmith"
        options = parser().parse_args(arguments)
        if options.command == "run" and outcome != "measured":
            assert (str(options.config), options.overrides[:2]) == (ASKED.config, list(ASKED.overrides))


def test_an_inconclusive_speed_is_measured_again_or_not_judged() -> None:
    again, by_acceptance, by_hand = steps()
    assert again.command == ASKED.run("--from", "evaluation")
    assert again.label.startswith("measure again") and "2 min" in again.label
    assert "gate.judge_speed=false" in by_acceptance.command
    another = {"look": {"number": 1, "of": 3, "prompts": 18}, "speed_warnings": []}
    undecided = rule("speed-up", passed=False, judged=False)
    first, *_ = steps(OF_A_LINE | another, rules=[undecided])
    assert first.label.startswith("measure 18 more prompts, and decide again")
    first, *_ = steps(OF_A_LINE | another | {"look": {"number": 3, "of": 3, "prompts": 18}}, rules=[undecided])
    assert first.label == "see why", "the last look was taken"
    assert "weekly@4" in by_hand.command
    assert not any("judge_speed" in step.command for step in steps(rules=[rule("tau", passed=False, judged=False)]))


def test_a_drafter_that_changes_outputs_is_not_to_be_promoted_by_hand() -> None:
    for name, offered in (("tau", True), ("lossless", False), ("near-ties", False), ("checksums", False)):
        made = steps(outcome="refused", rules=[rule(name, passed=False)])
        assert any(" promote " in step.command for step in made) is offered, name


def test_after_a_loss_of_acceptance_the_training_is_looked_at_and_nothing_promoted() -> None:
    lost = OF_A_LINE | {"verdicts": [verdict("tau", "opd", "champion", -1.6, 0.07)]}
    asked = replace(ASKED, mlflow="mlflow ui --backend-store-uri x")
    refused: dict[str, Any] = {"outcome": "refused", "rules": [rule("tau", passed=False)]}
    _, loss, compare = steps(lost, asked, **refused)
    assert (loss.purpose, loss.command) == ("see how it was trained: train/loss of run opd", asked.mlflow)
    assert compare.command.startswith("draftsmith evaluate ") and len(steps(lost, **refused)) == 2


def test_a_run_that_comes_from_no_command_has_no_file() -> None:
    assert invocation(None, "weekly").run() == "draftsmith run CONFIG"
    found = invocation('{"config": "a.yaml", "overrides": ["seed=2"]}', "weekly")
    assert found == Invocation("a.yaml", ["seed=2"], "weekly")
