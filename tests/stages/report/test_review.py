"""The review of an evaluation and a gate."""

from __future__ import annotations

from typing import Any

import pytest

from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.stages.report.review import ABSENT, Review, Variant, duration, interval, number, review_of
from tests.stages.report.sample_report import DECISION, EVALUATION, OF_A_LINE, SERVED, rule, verdict


def reviewed(evaluation: dict[str, Any], decision: dict[str, Any] | None = None) -> Review:
    gate = GateDecision.model_validate(decision) if decision else None
    return review_of(EvaluationResult.model_validate(evaluation), gate)


def variant(review: Review, arm: str) -> Variant:
    (found,) = [each for each in review.variants if each.arm == arm]
    return found


def decided(outcome: str, *rules: tuple[str, bool, bool], champion: str | None = "3") -> dict[str, Any]:
    """rules: name, passed, judged."""
    results = [rule(*each) for each in rules]
    return DECISION | {"outcome": outcome, "promote": outcome == "promoted", "rules": results, "champion": champion}


def test_variants_are_in_one_order_and_the_challenger_is_marked() -> None:
    review = reviewed(OF_A_LINE, DECISION)
    assert [each.arm for each in review.variants] == ["plain", "champion", "sft", "opd", "control"]
    assert [each.arm for each in review.variants if each.is_challenger] == ["opd"] == [review.challenger]
    assert review.other == "champion" and reviewed(EVALUATION).other == "sft"
    assert (review.comparisons, review.level) == (5, 0.9875)
    unknown = {"drafters": {"mine": {"tau": 2.0}, "yours": {"tau": 2.1}}, "speed": {"plain": {"tokens_per_s": 9.0}}}
    assert [each.name for each in reviewed(unknown).variants] == ["without a drafter", "mine", "yours"]


def test_the_adjusted_verdict_decides_on_significance_and_not_the_interval() -> None:
    given = [verdict("tau", "opd", "sft", 0.2, 0.1, different=False), verdict("tau", "control", "sft", 0.2, 0.1)]
    review = reviewed(EVALUATION | {"verdicts": given})
    assert variant(review, "opd").differences["sft"].significant is False
    assert variant(review, "control").differences["sft"].significant is True
    assert variant(review, "opd").differences["sft"].text("+.2f").endswith("n.s.")
    few = verdict("tau", "opd", "sft", 0.5, 0.1, low=None, high=None, different=None)
    assert variant(reviewed(EVALUATION | {"verdicts": [few]}), "opd").differences["sft"].text("+.1f") == "+0.5 ?"


def test_intervals_of_a_variant_are_widened_to_the_level_of_the_comparisons() -> None:
    alone, among = reviewed(EVALUATION | {"verdicts": []}), reviewed(EVALUATION)
    narrow, wide = (variant(review, "opd").acceptance for review in (alone, among))
    assert narrow.low is not None and wide.low is not None
    assert narrow.low == pytest.approx(3.543 - 0.111)
    assert 1.25 < (wide.value - wide.low) / (narrow.value - narrow.low) < 1.35
    speedup = variant(reviewed(OF_A_LINE), "opd").speedup
    assert speedup is not None and speedup.low is not None and 1.40 < speedup.low < 1.45


def test_speeds_with_a_warning_are_unreliable_and_inconclusive() -> None:
    review, calm = reviewed(OF_A_LINE), reviewed(OF_A_LINE | {"speed_warnings": []})
    assert [each.unreliable for each in review.variants] == [False, True, True, True, True]
    assert not any(each.unreliable for each in calm.variants)
    assert variant(review, "opd").speed_over["champion"].significant is None
    assert variant(calm, "opd").speed_over["champion"].significant is True
    (doubt,) = OF_A_LINE["speed_warnings"]
    of_one = reviewed(OF_A_LINE | {"speed_warnings": [doubt | {"arms": ["sft"]}]})
    assert [each.arm for each in of_one.variants if each.unreliable] == ["sft"]
    elsewhere = reviewed(OF_A_LINE | {"speed_warnings": [doubt | {"concurrency": 16}]})
    assert not any(each.unreliable for each in elsewhere.variants) and len(elsewhere.speed_warnings) == 1


def test_the_headline_goes_from_the_champion_to_the_challenger_at_every_concurrency() -> None:
    before = reviewed(SERVED).headline
    assert "1 in flight: 61.3 → 91.7 tokens/s" in before and "16 in flight: 981 → 1,467 tokens/s" in before
    assert "no drafter" in before and "unreliable" not in before
    assert "unreliable" in reviewed(OF_A_LINE).headline
    assert reviewed({"drafters": {"sft": {"tau": 2.0}}}).headline == ""


def test_rules_of_a_kind_are_one_tick_and_the_worst_counts() -> None:
    rules = [
        ("checksums", True, True), ("lossless", True, True), ("near-ties", False, True), ("tau of a", True, True),
        ("tau of b", True, False), ("speed-up", False, False), ("speed at temperature 0, 1 in flight", True, True),
    ]  # fmt: skip
    review = reviewed(OF_A_LINE, decided("refused", *rules))
    assert review.ticks() == [
        ("✓", "checksums"), ("✗", "lossless"), ("?", "slices"), ("?", "speed-up"), ("✓", "speed"),
    ]  # fmt: skip
    assert [check.result for check in review.checks].count("inconclusive") == 2


def test_looping_answers_and_outputs_that_are_not_the_targets_are_warnings() -> None:
    assert len(reviewed(EVALUATION).warnings) == 1 and "7%" in reviewed(EVALUATION).warnings[0]
    assert reviewed(EVALUATION | {"loop_share": 0.01}).warnings == []
    lossy = EVALUATION | {"loop_share": None, "exactness": {"fp32_prompts": 4, "fp32_identical": 3}}
    assert len(reviewed(lossy).warnings) == 1 and "3 of 4" in reviewed(lossy).warnings[0]
    assert len(reviewed(EVALUATION | {"loop_share": 0, "outside_nucleus_share": 0.02}).warnings) == 1


@pytest.mark.parametrize(
    ("decision", "words"),
    [
        (decided("promoted", ("tau", True, True)), ["SFT + OPD", "the place of version 3", "3.54 against 3.30"]),
        (decided("promoted", ("tau", True, True), champion=None), ["the line's first champion", "3.54"]),
        (
            decided("refused", ("tau", False, True), ("tau of code", False, True)),
            ["Version 3 stays", "fails acceptance length: why", "and 1 more"],
        ),
        (decided("refused", ("lossless", False, True), champion="champion"), ["The champion stays", "lossless"]),
        (decided("inconclusive", ("speed-up", False, False)), ["Speed-up is inconclusive: why"]),
        ({}, ["SFT + OPD", "3.54", "+0.10 against the champion", "not significant"]),
    ],
)
def test_an_outcome_is_one_sentence_with_its_reason(decision: dict[str, Any], words: list[str]) -> None:
    nothing = OF_A_LINE | {"verdicts": [verdict("tau", "opd", "champion", 0.1, 0.2)]}
    found = reviewed(nothing, decision).outcome
    assert found.kind == decision.get("outcome", "measured")
    assert all(word in found.sentence for word in words), found.sentence
    assert found.sentence.endswith(".") and ". " not in found.sentence
    assert (found.followed is not None) == (found.kind == "promoted")


def test_the_reason_is_the_start_of_the_rules_text() -> None:
    text = "1.496 times, inconclusive: other processes took 2% of the CPU (measure again); 3 turns, 5 are needed"
    found = reviewed(OF_A_LINE, DECISION | {"rules": [rule("speed-up", False, False, text)]}).outcome
    assert found.sentence.endswith(": other processes took 2% of the CPU.")
    assert text in found.reasons[0]
    long = reviewed(OF_A_LINE, DECISION | {"rules": [rule("speed-up", False, False, "so " * 200)]}).outcome
    assert len(long.sentence) < 160


def test_missing_numbers_are_shown_as_absent() -> None:
    assert interval((1.5, None, None), ".1f") == "1.5"
    assert interval((None, 1.0, 2.0), ".1f") == interval((float("nan"), 1.0, 2.0), ".1f") == ABSENT
    assert interval((0.0, -1.0, 1.0), "+.1f") == "+0.0\n[-1.0, +1.0]"
    assert interval((1.6, 0.0, 3486.82), ".2f") == "1.60\n[0.00, 3487]"
    assert interval((0.5, -1.0, 120.0), "+.1%") == "+50.0%\n[-100.0%, +12000.0%]"
    assert (number(True, ".1f"), number("3", ".1f")) == (ABSENT, ABSENT)
    assert [duration(seconds) for seconds in (12.4, 600, 7200)] == ["12 s", "10 min", "2.0 h"]
