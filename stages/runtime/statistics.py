"""Confidence intervals: over prompts by the delete-one jackknife, over timed runs by their spread; Student's t.

A percentile bootstrap over few units is too narrow. The jackknife with Student's t has the stated coverage even with
four prompts, needs no seed, and always gives the same interval. Its degrees of freedom come from the effective number
of units: with n - 1, long answers that outweigh short ones made it call equal drafters different in 6 to 7 % of cases
instead of 5 %. A measurement repeated on a sample of prompts has both errors (`combine_errors`).

Prompts come from sets whose shares a config fixes. Differences between the sets are therefore not an error: the
jackknife is stratified by set (Jones 1974; Wolter, Introduction to Variance Estimation, chapter 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv, stdtrit  # behind scipy.stats, which takes a second to load

CONFIDENCE = 0.95  # level of a single interval, and of all verdicts of a report jointly
Interval = tuple[float, float]
_MIN_DEGREES = 0.5  # if one unit outweighs all others, the interval is next to useless


@dataclass(frozen=True)
class Estimate:
    """A value with its error, from `units` independent repetitions (prompts, timed runs, answers)."""

    value: float
    error: float  # standard error; NaN with fewer than two units
    units: int
    degrees: float  # degrees of freedom of the error

    def interval(self, level: float = CONFIDENCE) -> Interval | None:
        """Return the two-sided interval; None with fewer than two units, whose error is unknown."""
        if math.isnan(self.error):
            return None
        margin = float(stdtrit(self.degrees, 0.5 + level / 2)) * self.error
        return self.value - margin, self.value + margin

    def upper(self, level: float = CONFIDENCE) -> float:
        """Return the upper end of the one-sided interval; infinity if the error is unknown."""
        if math.isnan(self.error):
            return math.inf
        return self.value + float(stdtrit(self.degrees, level)) * self.error


class Unit(NamedTuple):
    """An independent unit of a sample, and its stratum. Keys of another type all belong to one stratum."""

    stratum: str  # the prompt set
    name: str


def jackknife(
    statistic: Callable[..., np.ndarray], *samples: np.ndarray, strata: Sequence[Hashable] | None = None
) -> Estimate:
    """Return a statistic of sums over units, with its error from leaving out one unit at a time.

    samples: [units] each, not negative; a unit is left out of all of them (paired), and the others of its stratum
    weigh more in its place. statistic: a function of the sums of the samples, which are numbers or arrays [units].
    strata: [units]; by default one. Degrees of freedom follow Welch and Satterthwaite over the strata.
    """
    totals = [sample.sum() for sample in samples]
    value, units = float(statistic(*totals)), len(samples[0])
    if units < 2:
        return Estimate(value, math.nan, units, 0.0)
    variances, terms = 0.0, 0.0
    for stratum in stratum_indices(strata if strata is not None else [None] * units):
        size, members = len(stratum), [sample[stratum] for sample in samples]
        sums = [sample.sum() for sample in members]
        rest = [
            total - part + (part - sample) * (size / (size - 1))
            for total, part, sample in zip(totals, sums, members, strict=True)
        ]
        left = np.asarray(statistic(*rest))
        variance = (size - 1) / size * float(((left - left.mean()) ** 2).sum())
        shares = [sample / part for sample, part in zip(members, sums, strict=True) if part > 0]
        effective = 1 / float((np.mean(shares, axis=0) ** 2).sum()) if shares else float(size)
        variances += variance
        terms += variance**2 / max(_MIN_DEGREES, effective - 1)
    degrees = variances**2 / terms if terms > 0 else units - 1.0
    return Estimate(value, math.sqrt(variances), units, degrees)


def stratum_indices(strata: Sequence[Hashable]) -> list[np.ndarray]:
    """Return the indices of the units of each stratum, at least two in each.

    A single unit says nothing about its stratum's spread: all such units form one stratum, and if there is only one, it
    joins the smallest other stratum. The error is then too large rather than too small.
    """
    members: dict[Hashable, list[int]] = {}
    for index, stratum in enumerate(strata):
        members.setdefault(stratum, []).append(index)
    several = [indices for indices in members.values() if len(indices) > 1]
    single = [index for indices in members.values() if len(indices) == 1 for index in indices]
    if len(single) > 1:
        several.append(single)
    elif single and several:
        min(several, key=len).extend(single)
    return [np.array(indices) for indices in several]


def mean_estimate(values: np.ndarray) -> Estimate:
    """Return the mean of independent values [units]."""
    units = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(units) if units > 1 else math.nan
    return Estimate(float(values.mean()), error, units, units - 1.0)


def share_interval(count: int, units: int, level: float = CONFIDENCE) -> Interval:
    """Return the interval of a share, given `count` of `units` (Clopper and Pearson 1934)."""
    tail = (1 - level) / 2
    low = betaincinv(count, units - count + 1, tail) if count else 0.0
    high = betaincinv(count + 1, units - count, 1 - tail) if count < units else 1.0
    return float(low), float(high)


def combine_errors(repeated: Estimate, sampled: Estimate) -> Estimate:
    """Return the first value with both errors: of its repetitions, and of the sample that all repetitions used.

    The degrees of freedom follow Welch and Satterthwaite. Variation between single observations is in both errors, so
    the sum is too large rather than too small.
    """
    variances = repeated.error**2, sampled.error**2
    error = math.sqrt(sum(variances))
    if not error > 0:  # no variation, or an unknown error
        return Estimate(repeated.value, error, repeated.units, repeated.degrees)
    terms = zip(variances, (repeated.degrees, sampled.degrees), strict=True)
    degrees = sum(variances) ** 2 / sum(variance**2 / freedom for variance, freedom in terms)
    return Estimate(repeated.value, error, repeated.units, degrees)


def sum_by_key(keys: Sequence[Hashable], values: np.ndarray) -> np.ndarray:
    """Return [units] sums of the values that have the same key, in the order in which the keys first appear.

    Several answers to one prompt are not independent: together they are one unit.
    """
    units: dict[Hashable, int] = {}
    index = [units.setdefault(key, len(units)) for key in keys]
    return np.bincount(index, weights=values, minlength=len(units))


def strata_of(keys: Sequence[Hashable]) -> list[str | None]:
    """Return [units] the stratum of each unit, in the order of `sum_by_key`; None for a key that is not a `Unit`."""
    return [key.stratum if isinstance(key, Unit) else None for key in dict.fromkeys(keys)]


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Return sum over sum, never a mean of means."""
    return numerator / denominator


def ratio_difference(
    numerator: np.ndarray, denominator: np.ndarray, other_numerator: np.ndarray, other_denominator: np.ndarray
) -> np.ndarray:
    """Return the difference of two ratios of sums over the same units."""
    return numerator / denominator - other_numerator / other_denominator


def ratio_gain(
    numerator: np.ndarray, denominator: np.ndarray, other_numerator: np.ndarray, other_denominator: np.ndarray
) -> np.ndarray:
    """Return the relative gain of the first ratio over the second."""
    return numerator / denominator / (other_numerator / other_denominator) - 1


def simultaneous_level(count: int, level: float = CONFIDENCE) -> float:
    """Return the level of each of `count` intervals that hold jointly at `level` (Bonferroni)."""
    return 1 - (1 - level) / max(1, count)
