"""Comparisons of drafters: which pairs are compared, and verdicts whose intervals hold together.

Every verdict of an evaluation has an interval; all of them together leave out no true difference at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from draftsmith.artifacts.results.evaluation import CHAMPION, ArmComparison, EstimateRecord, Verdict
from draftsmith.stages.runtime.statistics import Estimate, simultaneous_level

Pair = tuple[str, str]  # an arm, and the one it is compared with

AGAINST_ALL = (CHAMPION, "sft")  # what every other drafter is compared with: the first of these among the arms
FURTHER: tuple[Pair, ...] = (("opd", "control"),)
FEWEST_RUNS = 5  # timed runs before two speeds may be called different: with fewer, their spread is unknown


def pairs(arms: Sequence[str]) -> list[Pair]:
    """Return the pairs to compare, arm by arm in their order; other arms are compared with the first one."""
    further = [pair for pair in FURTHER if pair[0] in arms and pair[1] in arms]
    common = next((other for other in AGAINST_ALL if other in arms), None)
    if common is None and arms and not further:
        common = arms[0]
    others = [*((arm, common) for arm in arms if common is not None and arm != common), *further]
    return [pair for arm in arms for pair in others if pair[0] == arm]


def verdicts(tau: Mapping[Pair, Estimate], speed: Mapping[Pair, Estimate], speed_prompts: int) -> list[Verdict]:
    """Return a verdict for each pair and kind: `tau`, a difference, and `speed`, a factor over timed runs.

    speed: estimates of the factor's logarithm. speed_prompts: in each run. Intervals are of a level that holds for as
    many as have enough measurements, or for one.
    """
    enough = [estimate.units >= 2 for estimate in tau.values()]
    enough += [_enough_runs(estimate) for estimate in speed.values()]
    level = simultaneous_level(sum(enough))
    found = []
    for (arm, other), estimate in tau.items():
        low, high = estimate.interval(level) or (None, None)
        found.append(
            Verdict(
                kind="tau",
                arm=arm,
                other=other,
                value=estimate.value,
                prompts=estimate.units,
                low=low,
                high=high,
                level=level,
                different=_different(estimate, level) if estimate.units >= 2 else None,
            )
        )
    for (arm, other), estimate in speed.items():
        low, high = estimate.interval(level) or (None, None)
        found.append(
            Verdict(
                kind="speed",
                arm=arm,
                other=other,
                value=math.exp(estimate.value),
                prompts=speed_prompts,
                turns=estimate.units,
                turns_needed=FEWEST_RUNS,
                low=None if low is None else math.exp(low),
                high=None if high is None else math.exp(high),
                level=level,
                different=_different(estimate, level) if _enough_runs(estimate) else None,
            )
        )
    return found


def _enough_runs(speed: Estimate) -> bool:
    return speed.units >= FEWEST_RUNS and not math.isnan(speed.error)


def _different(estimate: Estimate, level: float) -> bool | None:
    """Return whether 0 is outside the interval, which one without width (of equal drafters) does not show."""
    ends = estimate.interval(level)
    return None if ends is None else estimate.error > 0 and not ends[0] <= 0 <= ends[1]


def comparison(
    kind: str, pair: Pair, estimate: Estimate, **fields: str | float | EstimateRecord | None
) -> ArmComparison:
    """Return the record of an estimated difference. fields: further ones of the record."""
    return ArmComparison.model_validate(
        {"kind": kind, "arm": pair[0], "other": pair[1], **estimate_record(estimate).to_json(), **fields}
    )


def estimate_record(estimate: Estimate) -> EstimateRecord:
    """Return an estimate as JSON has it, without NaN."""
    error = None if math.isnan(estimate.error) else estimate.error
    return EstimateRecord(value=estimate.value, error=error, units=estimate.units, degrees=estimate.degrees)


def estimate_of(record: ArmComparison | EstimateRecord) -> Estimate:
    """Return the estimate of a record."""
    error = math.nan if record.error is None else record.error
    return Estimate(record.value, error, record.units, record.degrees)
