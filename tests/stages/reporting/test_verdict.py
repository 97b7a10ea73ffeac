"""What is said of an evaluation: as much as was measured, of one drafter each, and all of it together."""

from __future__ import annotations

from typing import Any

import pytest

from draftsmith.stages.reporting.verdict import findings
from tests.stages.reporting.sample_report import EVALUATION, verdict


def sentence(found: dict[str, Any], **evaluation: Any) -> str:
    return findings({"verdicts": [found], **evaluation})[0]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.2, "has a measurably higher tau than that of SFT: +0.200 (98.8 % interval +0.100 to +0.300, 40 prompts)."),
        (-0.2, "has a measurably lower tau than that of SFT: -0.200 (98.8 % interval -0.300 to -0.100, 40 prompts)."),
        (0.05, "does not differ measurably in tau from that of SFT: +0.050 (98.8 % interval -0.050 to +0.150"),
    ],
)
def test_a_sentence_on_tau_follows_from_its_verdict(value: float, said: str) -> None:
    assert said in sentence(verdict("tau", "opd", "sft", value, 0.1))


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1.2, "decodes measurably faster than that of SFT continued: 1.200 times its speed (98.8 % interval 1.100 to"),
        (0.8, "decodes measurably slower than that of SFT continued: 0.800 times its speed"),
        (1.05, "does not differ measurably in speed from that of SFT continued: 1.050 times its speed"),
    ],
)
def test_a_sentence_on_speed_says_over_what_it_was_measured(value: float, said: str) -> None:
    found = sentence(verdict("speed", "opd", "control", value, 0.1))
    assert said in found and found.endswith(", 5 turns over the same 6 prompts).")


def test_the_verdict_decides_and_not_the_interval() -> None:
    """It was given once, with all others: nobody judges anew."""
    assert "does not differ measurably" in sentence(verdict("tau", "opd", "sft", 0.2, 0.1, different=False))


def test_of_too_few_turns_nothing_is_called_measurable() -> None:
    few = verdict("speed", "opd", "sft", 1.5, 0.1, turns=1, low=None, high=None, different=None)
    found = findings({"verdicts": [few]})
    assert len(found) == 1 and "measurabl" not in found[0]
    assert "1.500 times its speed in 1 turn over the same 6 prompts, too few turns to tell" in found[0]
    assert "(5 are needed; raise evaluation.rounds)" in found[0]


def test_of_one_prompt_nothing_is_called_measurable() -> None:
    (found,) = findings({"verdicts": [verdict("tau", "opd", "sft", 0.5, 0.1, low=None, high=None, different=None)]})
    assert "+0.500" in found and "one held-out prompt cannot tell" in found


def test_a_training_is_said_to_be_one() -> None:
    told = verdict("tau", "opd", "sft", 0.2, 0.1)
    assert sentence(told, training_seeds={"opd": 3}).startswith("This drafter of SFT + OPD (one training, seed 3) has")
    assert sentence(told).startswith("This drafter of SFT + OPD (one training) has")
    other = verdict("tau", "champion", "sft", 0.2, 0.1)
    assert sentence(other).startswith("This drafter of champion (one training) has")


def test_the_number_of_verdicts_is_told_and_those_that_were_not_given_do_not_count() -> None:
    together = "These 4 verdicts hold together at 95 %: each interval is of 1 - 5 %/4, which is 98.8 %."
    assert findings(EVALUATION)[-1] == together
    few = verdict("speed", "control", "sft", 1.5, 0.1, turns=2, different=None)
    assert together in findings({"verdicts": [*EVALUATION["verdicts"], few]})
    alone = verdict("tau", "opd", "sft", 0.2, 0.1, level=0.95)
    assert findings({"verdicts": [alone]})[-1] == "This verdict holds at 95 %."
    assert findings({}) == []


def test_outputs_that_are_not_the_targets_own_are_a_finding() -> None:
    (said,) = findings({"exactness": {"fp32_prompts": 4, "fp32_identical": 3}})
    assert said.startswith("Do not serve these drafters: in fp32 only 3 of 4 outputs")
    assert findings({"exactness": {"fp32_prompts": 4, "fp32_identical": 4}}) == []
