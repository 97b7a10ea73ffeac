"""Intervals: stated coverage even with few units, narrower by pairing, clusters as one unit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from draftsmith.stages.runtime.statistics import (
    Estimate,
    jackknife,
    mean_estimate,
    ratio,
    ratio_difference,
    share_interval,
    stratum_indices,
)


def prompts(rng: np.random.Generator, count: int, gain: float = 0.0) -> tuple[np.ndarray, ...]:
    """Return committed tokens and steps of two drafters on different prompts; the second is `gain` better."""
    steps = rng.integers(10, 60, count).astype(float)
    difficulty = rng.normal(2.5, 0.6, count)
    first = steps * difficulty
    second = steps * (difficulty + gain + rng.normal(0, 0.05, count))
    return first, steps, second, steps


@pytest.mark.parametrize("count", [4, 12, 60])
def test_the_interval_has_its_stated_coverage(count: int) -> None:
    """2,000 trials: a coverage of 95 % is seen within 1.5 points (three standard deviations)."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        committed, steps, _, _ = prompts(rng, count)
        low, high = jackknife(ratio, committed, steps).interval() or (0, 0)
        covered += low <= 2.5 <= high
    assert 0.935 <= covered / 2000 <= 0.975


@pytest.mark.parametrize(
    ("sizes", "taus"),
    [((4, 4, 4), (1.5, 1.5, 2.9)), ((8, 8, 8), (1.46, 1.52, 2.88)), ((1, 5, 6), (1.5, 2.0, 3.0)), ((12,), (2.0,))],
    ids=["few-of-each", "quickstart", "unequal-shares", "one-set"],
)
def test_a_stratified_interval_has_its_stated_coverage(sizes: tuple[int, ...], taus: tuple[float, ...]) -> None:
    """2,000 trials of sets with fixed shares: 95 % is seen within 1.5 points, or above where a set has few prompts."""
    rng, covered, below = np.random.default_rng(0), 0, 0
    strata = [name for name, size in enumerate(sizes) for _ in range(size)]
    mean = np.repeat(taus, sizes)
    truth = float(mean.mean())
    for _ in range(2000):
        steps = rng.integers(10, 60, len(mean)).astype(float)
        estimate = jackknife(ratio, steps * rng.normal(mean, 0.2 * mean), steps, strata=strata)
        low, high = estimate.interval() or (0, 0)
        covered += low <= truth <= high
        below += estimate.upper(1 - 0.95) <= truth
    assert 0.935 <= covered / 2000 <= 0.985
    assert 0.93 <= below / 2000 <= 0.985, "one-sided, as the gate's"


def test_sets_that_differ_are_no_error_once_their_shares_are_fixed() -> None:
    strata, committed, steps = ["a", "a", "b", "b"], np.array([15.0, 15.0, 30.0, 30.0]), np.full(4, 10.0)
    assert jackknife(ratio, committed, steps, strata=strata).error == pytest.approx(0)
    assert jackknife(ratio, committed, steps).error > 0.4


def test_the_stratified_error_of_a_mean_is_that_of_the_textbook() -> None:
    """Compare with numpy's sum over strata of their variances of a mean (Cochran 1977, 5.9), weighted by the shares."""
    values, strata = np.array([1.0, 2.0, 4.0, 9.0, 3.0, 5.0, 8.0]), ["a", "a", "a", "b", "b", "b", "b"]
    found = jackknife(ratio, values, np.ones(7), strata=strata)
    variance = sum((len(own) / 7) ** 2 * own.var(ddof=1) / len(own) for own in (values[:3], values[3:]))
    assert found.error == pytest.approx(math.sqrt(variance), rel=1e-12)
    assert found.value == pytest.approx(values.mean())


def test_single_units_of_strata_are_one_stratum() -> None:
    def grouped(strata: str) -> list[list[int]]:
        return [own.tolist() for own in stratum_indices(strata)]

    assert grouped("aabb") == [[0, 1], [2, 3]]
    assert grouped("aabc") == [[0, 1], [2, 3]]
    assert grouped("aaabbc") == [[0, 1, 2], [3, 4, 5]], "a last one joins the smallest"
    assert grouped("abc") == [[0, 1, 2]]
    assert grouped("a") == []


def test_units_that_outweigh_the_others_cost_degrees_of_freedom() -> None:
    even = jackknife(ratio, np.array([4.0, 5.0, 6.0]), np.array([2.0, 2.0, 2.0]))
    assert even.degrees == pytest.approx(2, abs=0.1)
    one = jackknife(ratio, np.array([400.0, 5.0, 6.0]), np.array([200.0, 2.0, 2.0]))
    assert one.degrees == 0.5


def test_with_equal_denominators_the_interval_is_that_of_a_mean() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    found, known = jackknife(ratio, values, np.ones(4)), mean_estimate(values)
    assert (found.value, found.error) == (pytest.approx(known.value), pytest.approx(known.error))
    low, high = stats.t.interval(0.95, 3, loc=4.0, scale=values.std(ddof=1) / 2)
    assert known.interval() == (pytest.approx(low), pytest.approx(high))


def test_a_paired_difference_is_narrower_than_an_unpaired_one_and_finds_a_small_gain() -> None:
    first, steps, second, same = prompts(np.random.default_rng(1), 60, gain=0.1)
    low, high = jackknife(ratio_difference, second, same, first, steps).interval() or (0, 0)
    order = np.random.default_rng(2).permutation(60)
    loose = jackknife(ratio_difference, second, same, first[order], steps[order]).interval() or (0, 0)
    assert 0 < low < 0.1 < high
    assert high - low < (loose[1] - loose[0]) / 3
    assert loose[0] < 0


def test_one_unit_has_no_interval() -> None:
    for one in (jackknife(ratio, np.array([6.0]), np.array([2.0])), mean_estimate(np.array([3.0]))):
        assert (one.value, one.units, one.interval(), one.upper()) == (3.0, 1, None, math.inf)


def test_a_one_sided_bound_is_nearer_than_a_two_sided_one() -> None:
    estimate = Estimate(1.0, 0.5, 5, 4.0)
    assert estimate.upper(0.975) == pytest.approx((estimate.interval(0.95) or (0, 0))[1])
    assert estimate.upper(0.95) < estimate.upper(0.975)


@pytest.mark.parametrize(("count", "units"), [(0, 6), (6, 6), (8, 64), (20, 64)])
def test_the_interval_of_a_share_is_clopper_and_pearsons(count: int, units: int) -> None:
    expected = stats.binomtest(count, units).proportion_ci(0.95, method="exact")
    assert share_interval(count, units) == pytest.approx((expected.low, expected.high))
