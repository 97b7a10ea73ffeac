"""Confidence intervals: over prompts by the delete-one jackknife, over timed runs by their spread; Student's t.

A percentile bootstrap over few units is too narrow. The jackknife with Student's t covers as stated even with four
prompts, needs no seed, and always gives the same interval. Its degrees of freedom are those of the effective number of
units: with n - 1, long answers that outweigh short ones made it call equal drafters different in 6 to 7 % of cases
instead of 5 %. A measurement repeated on a sample of prompts has both errors (`combine_errors`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit  # of scipy.stats, which takes a second to load

CONFIDENCE = 0.95  # of a single interval, and of all verdicts of a report jointly
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


def jackknife(statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> Estimate:
    """Return a statistic of sums over units, with its error from leaving out one unit at a time.

    samples: [units] each, not negative; a unit is left out of all of them (paired). statistic: a function of the sums
    of the samples, which are numbers or arrays [units].
    """
    totals = [sample.sum() for sample in samples]
    value, units = float(statistic(*totals)), len(samples[0])
    if units < 2:
        return Estimate(value, math.nan, units, 0.0)
    left = np.asarray(statistic(*(total - sample for total, sample in zip(totals, samples, strict=True))))
    error = math.sqrt((units - 1) / units * float(((left - left.mean()) ** 2).sum()))
    weights = np.mean([sample / total for sample, total in zip(samples, totals, strict=True) if total > 0], axis=0)
    return Estimate(value, error, units, max(_MIN_DEGREES, 1 / float((weights**2).sum()) - 1))


def mean_estimate(values: np.ndarray) -> Estimate:
    """Return the mean of independent values [units]."""
    units = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(units) if units > 1 else math.nan
    return Estimate(float(values.mean()), error, units, units - 1.0)


def combine_errors(repeated: Estimate, sampled: Estimate) -> Estimate:
    """Return the first value with the errors of both: of its repetitions, and of the sample that all of them used.

    The degrees of freedom are those of Welch and Satterthwaite. Variation between single observations is in both
    errors, so the sum is too large rather than too small.
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


def simultaneous_level(count: int) -> float:
    """Return the level of each of `count` intervals that hold jointly at `CONFIDENCE` (Bonferroni)."""
    return 1 - (1 - CONFIDENCE) / max(1, count)
