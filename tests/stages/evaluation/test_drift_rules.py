"""Drift rules: which sets have degraded with the errors of both taus, and how often that is wrong."""

from __future__ import annotations

import numpy as np

from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.drift import ALL
from draftsmith.stages.evaluation.drift_rules import degraded_sets, inconclusive_sets
from draftsmith.stages.runtime.statistics import jackknife, ratio
from tests.stages.evaluation.test_error_rates import allowed


def now(tau: float, reach: float) -> SetMetrics:
    return SetMetrics(tau=tau, low=tau - reach, high=tau + reach, prompts=40)


FEW = SetMetrics(tau=1.0, low=None, high=None, prompts=1)
BEFORE = {"all": now(4.0, 0.01), "chat": now(3.0, 0.01), "code": now(5.0, 0.01)}


def test_a_set_whose_tau_fell_measurably_is_named() -> None:
    drift = {"all": now(3.9, 0.05), "chat": now(2.0, 0.3), "code": now(4.9, 0.05)}
    (text,) = degraded_sets(drift, BEFORE, 0.03)
    assert text == "chat: tau 2.000 (at most 2.300), 3.000 at its promotion (at least 2.990)"


def test_noise_and_unknown_sets_are_no_drift() -> None:
    assert degraded_sets({"all": now(3.5, 0.6)}, BEFORE, 0.03) == []
    assert degraded_sets({"maths": now(1.0, 0.1)}, BEFORE, 0.03) == []
    assert degraded_sets({"all": FEW}, BEFORE, 0.03) == []
    assert degraded_sets({"all": now(1.0, 0.1)}, {"all": FEW.model_copy(update={"tau": 4.0})}, 0.03) == [], (
        "a single prompt then"
    )


def test_the_threshold_is_a_share_of_tau_at_the_promotion() -> None:
    assert degraded_sets({"all": now(3.7, 0.1)}, BEFORE, 0.03) != []
    assert degraded_sets({"all": now(3.7, 0.1)}, BEFORE, 0.1) == []


def test_inconclusive_sets_are_named_with_the_reason() -> None:
    gone = "inconclusive, no longer among the prompts: 1 set (code)"
    assert inconclusive_sets({"all": now(3.5, 0.6), "chat": now(1.0, 0.1)}, BEFORE) == [gone]
    assert inconclusive_sets({"all": now(4.0, 0.1), "chat": FEW, **{f"task{n}": FEW for n in range(7)}}, BEFORE) == [
        "inconclusive, not measured at its promotion: 7 sets (task0, task1, task2, task3, task4, …)",
        "inconclusive, too few prompts: 1 set (chat)",
        gone,
    ]
    assert inconclusive_sets({"all": now(4.0, 0.1)}, {"all": FEW}) == ["inconclusive, too few prompts: 1 set (all)"]


def test_the_promotion_has_an_error_too() -> None:
    """0.5 below the limit, with 0.4 each: 0.57 together."""
    assert degraded_sets({"all": now(3.38, 0.4)}, {"all": now(4.0, 0.01)}, 0.03) != []
    assert degraded_sets({"all": now(3.38, 0.4)}, {"all": now(4.0, 0.4)}, 0.03) == []


def measured(rng: np.random.Generator, sets: int, prompts: int, share: float = 1.0) -> dict[str, SetMetrics]:
    """Return a drift check on new prompts, with tau times `share`."""
    tau = np.clip(np.exp(rng.normal(1.0, 0.3, (sets, prompts))) * share, 1.02, None)
    committed = rng.lognormal(5, 0.5, (sets, prompts))
    found = {}
    for name, places in {ALL: slice(None), **{f"set{n}": slice(n, n + 1) for n in range(sets)}}.items():
        estimate = jackknife(ratio, committed[places].ravel(), (committed / tau)[places].ravel())
        low, high = estimate.interval() or (None, None)
        found[name] = SetMetrics(tau=estimate.value, low=low, high=high, prompts=estimate.units)
    return found


def test_none_of_many_sets_is_named_where_nothing_changed() -> None:
    """By single intervals of today's taus alone more than half of these checks set off a refresh."""
    rng, repetitions = np.random.default_rng(0), 300
    alarms = [bool(degraded_sets(measured(rng, 10, 14), measured(rng, 10, 14), 0.0)) for _ in range(repetitions)]
    assert sum(alarms) / repetitions <= allowed(repetitions)


def test_no_set_is_named_where_the_promotion_had_few_prompts() -> None:
    """By the tail of today's many prompts, one check in seven sets off a refresh."""
    rng, repetitions = np.random.default_rng(2), 300
    alarms = [bool(degraded_sets(measured(rng, 20, 60), measured(rng, 20, 3), 0.0)) for _ in range(repetitions)]
    assert sum(alarms) / repetitions <= allowed(repetitions)


def test_a_fall_of_a_fifth_is_seen() -> None:
    rng, repetitions = np.random.default_rng(1), 100
    seen = [bool(degraded_sets(measured(rng, 10, 14, 0.8), measured(rng, 10, 14), 0.03)) for _ in range(repetitions)]
    assert sum(seen) / repetitions > 0.8
