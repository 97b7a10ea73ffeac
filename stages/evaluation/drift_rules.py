"""Drift: the prompt sets in which a champion has become measurably worse than at its promotion."""

from __future__ import annotations

import math
from collections.abc import Mapping

from scipy.special import stdtrit

from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.drift import ALL
from draftsmith.stages.runtime.statistics import CONFIDENCE, simultaneous_level

_MOST_NAMES = 5  # of prompt sets in a sentence


def degraded_sets(now: Mapping[str, SetMetrics], then: Mapping[str, SetMetrics], threshold: float) -> list[str]:
    """Return the sets in which tau fell by more than `threshold` of what it was, in words; `all` for all prompts.

    now: of the drift check. then: at the promotion. Both have an error, as they come from different prompts; the single
    sets share theirs (Bonferroni), so that one is named in at most 5 % of checks where nothing fell.
    """
    comparable = [name for name in now if _is_comparable(name, now, then)]
    shared = 0.5 + simultaneous_level(sum(name != ALL for name in comparable)) / 2
    found = []
    for name in comparable:
        tau, _, high = _interval(now[name])
        tau_then, low_then, _ = _interval(then[name])
        remaining = 1 - threshold
        reach = math.hypot(high - tau, remaining * (tau_then - low_then))
        fewest = min(each.prompts for each in (now[name], then[name]) if each.prompts is not None)
        single, wider = stdtrit(fewest - 1, [0.5 + CONFIDENCE / 2, shared])  # the wider tail for both errors
        if tau + reach * (1 if name == ALL else wider / single) < remaining * tau_then:
            was = f"{tau_then:.3f} at its promotion (at least {low_then:.3f})"
            found.append(f"{name}: tau {tau:.3f} (at most {high:.3f}), {was}")
    return found


def _is_comparable(name: str, now: Mapping[str, SetMetrics], then: Mapping[str, SetMetrics]) -> bool:
    """Return whether the set was measured both times, on more than one prompt."""
    return name in then and now[name].has_interval and then[name].has_interval


def _interval(metrics: SetMetrics) -> tuple[float, float, float]:
    assert metrics.tau is not None and metrics.low is not None and metrics.high is not None
    return metrics.tau, metrics.low, metrics.high


def inconclusive_sets(now: Mapping[str, SetMetrics], then: Mapping[str, SetMetrics]) -> list[str]:
    """Return the sets that `degraded_sets` cannot decide on, in words, by reason."""
    unknown = [name for name in now if name not in then or then[name].tau is None]
    few = [name for name in now if name not in unknown and not _is_comparable(name, now, then)]
    gone = [name for name in then if name not in now]
    return [
        f"inconclusive, {why}: {len(names)} set{'s' * (len(names) != 1)} ({', '.join(names[:_MOST_NAMES])}"
        f"{', …' * (len(names) > _MOST_NAMES)})"
        for why, names in (
            ("not measured at its promotion", unknown),
            ("too few prompts", few),
            ("no longer among the prompts", gone),
        )
        if names
    ]
