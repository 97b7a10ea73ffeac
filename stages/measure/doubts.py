"""Figures of speed that cannot be, or that say nothing: they are named, and nothing is decided on them.

A verify step costs at least what a step of plain decoding costs, so that no drafter speeds decoding up by more than the
tokens that its steps commit. Arms are compared round by round, which a steady machine needs: a ratio that goes up or
down with the rounds is of the machine, and a load that changed between turns fell on one arm and not on another.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from draftsmith.stages.measure.requests import PLAIN, Setting
from draftsmith.stages.measure.speed import at_setting
from draftsmith.stages.measure.verdicts import FEWEST_TURNS

FEWEST_PROMPTS = 4  # decoded in a turn
_PROMPTS_PER_REQUEST = 2  # in flight: with as many prompts as are in flight, intervals of 95 % miss in 13 to 18 %
ABOVE_TAU = 1.05  # times tau: what noise may add to a speed-up
DRIFT_P, DRIFT_CHANGE = 0.005, 0.05  # a trend is one if chance gives it so seldom, and by so much from first to last
LOAD_CHANGE = 0.15  # of the machine's CPU time, between the quietest and the busiest turn
CLOCK_CHANGE = 1.15  # the fastest clock over the slowest


@dataclass(frozen=True)
class Doubt:
    """What is wrong with figures at one setting."""

    kind: str  # prompts, turns, tau, drift, load, clock
    said: str
    temperature: float
    concurrency: int
    arms: tuple[str, ...] = ()  # that it is about; empty: all


def doubts(
    turns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], settings: Sequence[Setting]
) -> list[dict[str, Any]]:
    """Of every setting, ready for JSON. turns, rows: of the tables `turns` and `requests`."""
    found = []
    for setting in settings:
        own, requests = at_setting(turns, setting), at_setting(rows, setting)
        of_speed = *_above_tau(own, requests, setting), *_drifting(own), *_disturbed(own)
        for kind, said, *arms in (*_few(own, setting), *of_speed):
            found.append(asdict(Doubt(kind, said, setting.temperature, setting.concurrency, tuple(arms))))
    return found


def doubts_about(evaluation: Mapping[str, Any], setting: Mapping[str, Any], *arms: str) -> list[str]:
    """What `evaluation["doubts"]` says of these arms at a setting (with `temperature` and `concurrency`)."""
    return [
        doubt["said"]
        for doubt in evaluation.get("doubts") or ()
        if all(doubt[name] == setting[name] for name in ("temperature", "concurrency"))
        and (not doubt["arms"] or set(arms) & set(doubt["arms"]))
    ]


def fewest_prompts(concurrency: int) -> int:
    """In a turn, from which on its speed is judged: one with several requests in flight ends with its slowest."""
    return FEWEST_PROMPTS if concurrency == 1 else max(FEWEST_PROMPTS, _PROMPTS_PER_REQUEST * concurrency)


def few_turns(turns: int) -> str:
    """Why nothing is judged by so many."""
    return f"{turns} turn{'s' * (turns != 1)}, {FEWEST_TURNS} are needed: raise evaluation.rounds"


def _few(turns: Sequence[Mapping[str, Any]], setting: Setting) -> Iterator[tuple[str, ...]]:
    prompts, rounds = turns[0]["prompts"], len({turn["round"] for turn in turns})
    said, more = f"{prompts} prompt{'s' * (prompts != 1)} a turn", "raise evaluation.speed_prompts"
    if prompts < setting.concurrency:
        yield "prompts", f"{said} are never {setting.concurrency} in flight ({more})"
    elif prompts < (needed := fewest_prompts(setting.concurrency)):
        several = f", {setting.concurrency} in flight," if setting.concurrency > 1 else ""
        yield "prompts", f"{said}{several} say little of others ({needed} are needed: {more})"
    if rounds < FEWEST_TURNS:
        yield "turns", few_turns(rounds)


def _above_tau(
    turns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], setting: Setting
) -> Iterator[tuple[str, ...]]:
    """Several requests at a time end when the slowest ends: then the best tau of a single request is the bound."""
    for arm, ratios in _by_round(turns, PLAIN).items():
        own = [turn for turn in turns if turn["arm"] == arm]
        steps = sum(turn["verify_steps"] for turn in own)
        if not steps:
            continue
        bound = sum(turn["tokens"] - turn["prompts"] for turn in own) / steps
        if setting.concurrency > 1:
            each = [(r["tokens"] - 1) / r["verify_steps"] for r in rows if r["arm"] == arm and r["verify_steps"]]
            bound = max([bound, *each])
        speedup = math.exp(float(np.mean(ratios)))
        if speedup > ABOVE_TAU * bound:
            yield (
                "tau",
                f"the speed-up of {arm} was measured as {speedup:.2f} with a served tau of {bound:.2f}: no drafter "
                "saves more than its tau, so that the machine was not the same for both (measure again)",
                arm,
            )


def _drifting(turns: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """A trend over rounds of an arm's speed beside that of plain decoding, which should have none."""
    for arm, ratios in _by_round(turns, PLAIN).items():
        if len(ratios) < FEWEST_TURNS or np.ptp(ratios) == 0:
            continue
        from scipy import stats

        fit = stats.linregress(np.arange(len(ratios)), ratios)
        change = float(fit.slope) * (len(ratios) - 1)
        if fit.pvalue < DRIFT_P and abs(change) > DRIFT_CHANGE:
            went = f"{'up' if change > 0 else 'down'} by {abs(math.expm1(change)):.0%}"
            yield (
                "drift",
                f"the speed of {arm} over plain decoding went {went} from the first to the last of {len(ratios)} "
                "rounds: its repetitions are not of the same thing (measure again, on a machine that has warmed up)",
                arm,
            )


def _disturbed(turns: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """By the facts that were recorded with every turn; without them nothing is said."""
    taken = _known(turns, "others_share") + _known(turns, "stolen_share")
    taken = taken[~np.isnan(taken)]
    if len(taken) > 1 and np.ptp(taken) > LOAD_CHANGE:
        yield (
            "load",
            f"other processes took between {taken.min():.0%} and {taken.max():.0%} of the machine's CPU time from turn "
            "to turn: its load changed while it was measured (measure again when it is free)",
        )
    for name, what in (("cpu_mhz", "CPU"), ("gpu_mhz", "GPU")):
        clock = _known(turns, name)
        clock = clock[~np.isnan(clock)]
        if len(clock) > 1 and clock.max() > CLOCK_CHANGE * clock.min():
            yield (
                "clock",
                f"the {what}'s clock was between {clock.min():.0f} and {clock.max():.0f} MHz from turn to turn "
                "(fix it, or let the machine cool)",
            )


def _known(turns: Sequence[Mapping[str, Any]], name: str) -> np.ndarray:
    """[turns], NaN where it was not recorded."""
    values = [turn.get(name) for turn in turns]
    return np.array([math.nan if value is None else value for value in values], dtype=np.float64)


def _by_round(turns: Sequence[Mapping[str, Any]], other: str) -> dict[str, np.ndarray]:
    """Arm -> [rounds] logarithm of how many times as fast it was as the other one in the same round."""
    speeds: dict[str, dict[int, float]] = {}
    for turn in turns:
        speeds.setdefault(turn["arm"], {})[turn["round"]] = math.log(turn["tokens"] / turn["wall_seconds"])
    beside = speeds.pop(other, {})
    return {arm: np.array([by[n] - beside[n] for n in sorted(by) if n in beside]) for arm, by in speeds.items()}
