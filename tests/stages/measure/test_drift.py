"""Drift is what lies below the limit with its whole interval."""

from __future__ import annotations

from draftsmith.stages.measure.drift import fallen, unjudged

BEFORE = {"all": {"tau": 4.0}, "chat": {"tau": 3.0}, "code": {"tau": 5.0}}


def now(tau: float, reach: float) -> dict[str, float]:
    return {"tau": tau, "low": tau - reach, "high": tau + reach}


def test_what_fell_measurably_is_named() -> None:
    drift = {"all": now(3.9, 0.05), "chat": now(2.0, 0.3), "code": now(4.9, 0.05)}
    (said,) = fallen(drift, BEFORE, 0.03)
    assert said == "chat: tau 2.000 (at most 2.300), 3.000 at its promotion"


def test_noise_and_unknown_sets_are_no_drift() -> None:
    assert fallen({"all": now(3.5, 0.6)}, BEFORE, 0.03) == []
    assert fallen({"maths": now(1.0, 0.1)}, BEFORE, 0.03) == []
    assert fallen({"all": {"tau": 1.0, "low": None, "high": None}}, BEFORE, 0.03) == []


def test_the_threshold_is_a_share_of_what_it_was() -> None:
    assert fallen({"all": now(3.7, 0.1)}, BEFORE, 0.03) != []
    assert fallen({"all": now(3.7, 0.1)}, BEFORE, 0.1) == []


def test_what_cannot_be_judged_is_named() -> None:
    few = {"tau": 1.0, "low": None, "high": None}
    gone = "not judged, no longer asked: 1 set (code)"
    assert unjudged({"all": now(3.5, 0.6), "chat": now(1.0, 0.1)}, BEFORE) == [gone]
    assert unjudged({"all": now(4.0, 0.1), "chat": few, **{f"task{n}": few for n in range(7)}}, BEFORE) == [
        "not judged, for want of a figure at its promotion: 7 sets (task0, task1, task2, task3, task4, …)",
        "not judged, for want of prompts: 1 set (chat)",
        gone,
    ]
