"""Comparisons of drafters: which pairs are compared, and verdicts whose intervals hold together.

Every verdict of an evaluation has an interval; together they contain all true differences at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from draftsmith.artifacts.results.evaluation import CHAMPION, NATIVE, ArmComparison, EstimateRecord, LoadPoint, Verdict
from draftsmith.stages.runtime.statistics import Estimate, simultaneous_level

Pair = tuple[str, str]  # an arm, and the arm it is compared with

AGAINST_ALL = (CHAMPION, "sft")  # every other drafter is compared with the first of these among the arms
FURTHER: tuple[Pair, ...] = (("opd", "control"), ("opd", NATIVE))
FEWEST_IN_SLICE = 4  # prompts for a slice to be judged: with fewer, an interval means nothing
FEWEST_RUNS = 5  # timed runs to call two speeds different: with fewer, their spread is unknown


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

    speed: estimates of the factor's logarithm. speed_prompts: the number in each run. The intervals share one level
    (Bonferroni over the comparisons with enough measurements).
    """
    enough = [estimate.units >= 2 for estimate in tau.values()]
    enough += [_enough_runs(estimate) for estimate in speed.values()]
    level = simultaneous_level(sum(enough))
    judged = [
        _verdict("tau", pair, estimate, level, estimate.units >= 2, prompts=estimate.units)
        for pair, estimate in tau.items()
    ]
    for pair, estimate in speed.items():
        runs = {"prompts": speed_prompts, "turns": estimate.units, "turns_needed": FEWEST_RUNS}
        judged.append(_verdict("speed", pair, estimate, level, _enough_runs(estimate), **runs))
    return judged


def _enough_runs(speed: Estimate) -> bool:
    return speed.units >= FEWEST_RUNS and not math.isnan(speed.error)


def _verdict(kind: str, pair: Pair, estimate: Estimate, level: float, enough: bool, **counts: int) -> Verdict:
    """Return the verdict of one pair. An interval without width (of equal drafters) shows no difference."""
    ends = estimate.interval(level)
    different = None
    if enough and ends is not None:
        different = estimate.error > 0 and not ends[0] <= 0 <= ends[1]
    shown = math.exp if kind == "speed" else float
    low, high = map(shown, ends) if ends is not None else (None, None)
    fields = {"value": shown(estimate.value), "low": low, "high": high, "level": level, "different": different}
    return Verdict.model_validate({"kind": kind, "arm": pair[0], "other": pair[1], **counts, **fields})


def comparison(
    kind: str, pair: Pair, estimate: Estimate, **fields: str | float | EstimateRecord | None
) -> ArmComparison:
    """Return the record of an estimated difference. fields: further fields of the record."""
    return ArmComparison.model_validate(
        {"kind": kind, "arm": pair[0], "other": pair[1], **estimate_record(estimate).to_json(), **fields}
    )


def too_small(estimate: Estimate) -> str:
    """Return why a slice is too small to be judged; empty if it is large enough."""
    if round(estimate.degrees + 1) >= FEWEST_IN_SLICE:  # prompts in effect
        return ""
    prompts = f"{estimate.units} prompt{'s' * (estimate.units != 1)}"
    if estimate.units < FEWEST_IN_SLICE:
        return f"{prompts}, {FEWEST_IN_SLICE} are needed"
    return (
        f"its {prompts} count as {round(estimate.degrees + 1)}: few have most of the tokens, or its sets have few each"
    )


def estimate_record(estimate: Estimate) -> EstimateRecord:
    """Convert an estimate to its JSON record; a NaN error becomes None."""
    error = None if math.isnan(estimate.error) else estimate.error
    return EstimateRecord(value=estimate.value, error=error, units=estimate.units, degrees=estimate.degrees)


def estimate_of(record: ArmComparison | EstimateRecord) -> Estimate:
    """Return the estimate of a record."""
    error = math.nan if record.error is None else record.error
    return Estimate(record.value, error, record.units, record.degrees)


def load_factor(point: LoadPoint) -> tuple[float, float | None, float | None]:
    """Return an arm's speed as a multiple of another's, with the ends of its 95 % interval."""
    low, high = (math.exp(end) for end in estimate_of(point).interval() or (math.nan, math.nan))
    return math.exp(point.value), *((low, high) if math.isfinite(low) else (None, None))


def at_loads(curve: Sequence[LoadPoint], loads: Mapping[int, float]) -> tuple[Estimate, float] | None:
    """Return the logarithm of an arm's speed over another's at a mix of loads, and its tokens/s.

    curve: ascending, interpolated between its points. loads: requests in flight -> share of the time. None if a load
    lies below or above the curve. The errors of all loads are added: they come from the same prompts.
    """
    if not curve or min(loads) < curve[0].concurrency or max(loads) > curve[-1].concurrency:
        return None
    numbers = np.log2([point.concurrency for point in curve])
    wanted, shares = np.log2(list(loads)), np.array(list(loads.values()))
    speeds = np.exp(np.interp(wanted, numbers, np.log([point.tokens_per_s for point in curve])))
    values = np.interp(wanted, numbers, [point.value for point in curve])
    errors = np.interp(wanted, numbers, [estimate_of(point).error for point in curve])
    speed, other_speed = shares @ speeds, shares @ (speeds / np.exp(values))
    error = float(shares * speeds @ errors / speed)
    degrees, units = min(point.degrees for point in curve), min(point.units for point in curve)
    return Estimate(float(np.log(speed / other_speed)), error, units, degrees), float(speed / shares.sum())
