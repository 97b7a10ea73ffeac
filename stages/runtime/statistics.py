"""Intervals of what was measured: over prompts by the delete-one jackknife, over turns by their spread; Student's t.

A percentile bootstrap over few units is too narrow. The jackknife with Student's t keeps what it says with four prompts
too, needs no seed, and gives the same interval every time. Its degrees of freedom are those of the effective number of
units: with n - 1, long answers that outweigh short ones made it say "different" of equals in 6 to 7 % instead of 5 %.
What was repeated on a sample of prompts has both errors (`combine_errors`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit  # of scipy.stats, which takes a second to load

CONFIDENCE = 0.95  # of a single interval, and of all verdicts of a report together
Interval = tuple[float, float]
_FEWEST_DEGREES = 0.5  # where one unit outweighs all others, next to nothing is known


@dataclass(frozen=True)
class Estimate:
    """A value with its error, from `units` independent repetitions (prompts, turns, answers)."""

    value: float
    error: float  # standard error; NaN of fewer than two units
    units: int
    degrees: float  # of freedom of the error

    def interval(self, level: float = CONFIDENCE) -> Interval | None:
        """Two-sided; None where nothing is known of the error: of fewer than two units."""
        if math.isnan(self.error):
            return None
        reach = float(stdtrit(self.degrees, 0.5 + level / 2)) * self.error
        return self.value - reach, self.value + reach

    def upper(self, level: float = CONFIDENCE) -> float:
        """End of the one-sided interval that has no lower end; infinite where nothing is known of the error."""
        if math.isnan(self.error):
            return math.inf
        return self.value + float(stdtrit(self.degrees, level)) * self.error


def jackknife(statistic: Callable[..., np.ndarray], *samples: np.ndarray) -> Estimate:
    """A statistic of sums over units, and its error by leaving out one unit at a time.

    samples: [units] each, not negative; a unit is left out of all at once (paired). statistic: takes the sums of the
    samples: numbers, or arrays [units].
    """
    totals = [sample.sum() for sample in samples]
    value, units = float(statistic(*totals)), len(samples[0])
    if units < 2:
        return Estimate(value, math.nan, units, 0.0)
    left = np.asarray(statistic(*(total - sample for total, sample in zip(totals, samples, strict=True))))
    error = math.sqrt((units - 1) / units * float(((left - left.mean()) ** 2).sum()))
    weights = np.mean([sample / total for sample, total in zip(samples, totals, strict=True) if total > 0], axis=0)
    return Estimate(value, error, units, max(_FEWEST_DEGREES, 1 / float((weights**2).sum()) - 1))


def mean_estimate(values: np.ndarray) -> Estimate:
    """The mean of independent values [units]."""
    units = len(values)
    error = float(values.std(ddof=1)) / math.sqrt(units) if units > 1 else math.nan
    return Estimate(float(values.mean()), error, units, units - 1.0)


def combine_errors(repeated: Estimate, sampled: Estimate) -> Estimate:
    """The value of the first with the errors of both: of its repetitions, and of the sample that all of them used.

    Welch and Satterthwaite's degrees of freedom. What varies from observation to observation is in both errors, so the
    sum is rather too large than too small.
    """
    variances = repeated.error**2, sampled.error**2
    error = math.sqrt(sum(variances))
    if not error > 0:  # nothing varies, or nothing is known
        return Estimate(repeated.value, error, repeated.units, repeated.degrees)
    terms = zip(variances, (repeated.degrees, sampled.degrees), strict=True)
    degrees = sum(variances) ** 2 / sum(variance**2 / of for variance, of in terms)
    return Estimate(repeated.value, error, repeated.units, degrees)


def sum_by_key(keys: Sequence[Hashable], values: np.ndarray) -> np.ndarray:
    """[units] sums of the values that have the same key, in the order in which keys first come.

    Several answers to one prompt are no independent units: together they are one.
    """
    place: dict[Hashable, int] = {}
    index = [place.setdefault(key, len(place)) for key in keys]
    return np.bincount(index, weights=values, minlength=len(place))


def ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """Sum over sum: never a mean of means."""
    return numerator / denominator


def ratio_difference(
    numerator: np.ndarray, denominator: np.ndarray, other_numerator: np.ndarray, other_denominator: np.ndarray
) -> np.ndarray:
    """Difference of two ratios of sums over the same units."""
    return numerator / denominator - other_numerator / other_denominator


def ratio_gain(
    numerator: np.ndarray, denominator: np.ndarray, other_numerator: np.ndarray, other_denominator: np.ndarray
) -> np.ndarray:
    """Their difference as a share of the second."""
    return numerator / denominator / (other_numerator / other_denominator) - 1


def simultaneous_level(count: int) -> float:
    """Level of each of `count` intervals that hold together at `CONFIDENCE` (Bonferroni: whatever their dependence)."""
    return 1 - (1 - CONFIDENCE) / max(1, count)
