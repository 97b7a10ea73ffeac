"""Which drafters are compared with which, and what may be said of each pair: verdicts that hold together.

Every verdict of an evaluation has an interval; all of them together leave out no true difference at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from draftsmith.stages.runtime.statistics import Estimate, simultaneous_level

Pair = tuple[str, str]  # an arm, and the one it is compared with

AGAINST_ALL = ("champion", "sft")  # what every other drafter is compared with: the first of these that is there
FURTHER: tuple[Pair, ...] = (("opd", "control"),)
FEWEST_TURNS = 5  # before two speeds may be called different: below, nothing is known of their spread


def pairs(arms: Sequence[str]) -> list[Pair]:
    """The comparisons that are made of these drafters, arm by arm in their order; of unknown ones with the first."""
    further = [pair for pair in FURTHER if pair[0] in arms and pair[1] in arms]
    common = next((other for other in AGAINST_ALL if other in arms), None)
    if common is None and arms and not further:
        common = arms[0]
    others = [*((arm, common) for arm in arms if common is not None and arm != common), *further]
    return [pair for arm in arms for pair in others if pair[0] == arm]


def verdicts(tau: Mapping[Pair, Estimate], speed: Mapping[Pair, Estimate], speed_prompts: int) -> list[dict[str, Any]]:
    """One for each pair and kind (`tau`: a difference; `speed`: a factor over turns of these prompts), ready for JSON.

    speed: of logarithms of the factor. `different` is true or false where enough was measured to judge, else null;
    intervals are of `level`, that of a single interval among as many as are judged (where nothing is judged: of one).
    """
    judged = [estimate.units >= 2 for estimate in tau.values()]
    judged += [_enough(estimate) for estimate in speed.values()]
    level = simultaneous_level(sum(judged))
    found = []
    for (arm, other), estimate in tau.items():
        said = {"kind": "tau", "arm": arm, "other": other, "value": estimate.value, "prompts": estimate.units}
        found.append(said | _judged(estimate, level, estimate.units >= 2))
    for (arm, other), estimate in speed.items():
        said = {"kind": "speed", "arm": arm, "other": other, "value": math.exp(estimate.value)}
        said |= {"prompts": speed_prompts, "turns": estimate.units, "turns_needed": FEWEST_TURNS}
        judgement = _judged(estimate, level, _enough(estimate))
        ends = {end: None if judgement[end] is None else math.exp(judgement[end]) for end in ("low", "high")}
        found.append(said | judgement | ends)
    return found


def _enough(speed: Estimate) -> bool:
    return speed.units >= FEWEST_TURNS and not math.isnan(speed.error)


def _judged(estimate: Estimate, level: float, enough: bool) -> dict[str, Any]:
    """An interval without width (of drafters that are one) says nothing of a difference."""
    low, high = estimate.interval(level) or (None, None)
    different = None
    if enough and low is not None and high is not None:
        different = estimate.error > 0 and not low <= 0 <= high
    return {"low": low, "high": high, "level": level, "different": different}
