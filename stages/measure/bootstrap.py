"""Intervals for ratios of sums, resampled over prompts."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import stats

Interval = tuple[float, float]
CONFIDENCE = 0.95  # what tables and reports call "95 %"


def interval(statistic: Any, samples: tuple[np.ndarray, ...], resamples: int, seed: int) -> Interval:
    """95 % percentile bootstrap over the first axis of `samples`, drawn together (paired).

    statistic: takes the samples with any leading axes and reduces the last one.
    A single prompt has no spread to resample: the interval is then the value itself.
    """
    if len(samples[0]) < 2:
        value = float(statistic(*samples, axis=-1))
        return value, value
    result = stats.bootstrap(
        samples,
        statistic,
        n_resamples=resamples,
        batch=1000,
        vectorized=True,
        paired=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def ratio(numerator: np.ndarray, denominator: np.ndarray, axis: int = -1) -> np.ndarray:
    """Sum over sum: never a mean of means."""
    return numerator.sum(axis) / denominator.sum(axis)


def ratio_difference(
    numerator: np.ndarray,
    denominator: np.ndarray,
    other_numerator: np.ndarray,
    other_denominator: np.ndarray,
    axis: int = -1,
) -> np.ndarray:
    """Difference of two ratios of sums on the same prompts."""
    return ratio(numerator, denominator, axis) - ratio(other_numerator, other_denominator, axis)
