"""Which speeds of an evaluation say nothing, and why. The gate judges none of them.

Arms are compared on the same prompts, so what a machine does to all of them alike cancels. What is left is checked
here: too few prompts or turns, a speed-up that no drafter can have, and repetitions of the same comparison that differ
so much that the machine decides the result. The last two are measured again.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from draftsmith.stages.evaluation.speed_table import alternates, at_setting, log_ratios
from draftsmith.stages.evaluation.timed_runs import PLAIN, Setting
from draftsmith.stages.evaluation.verdicts import FEWEST_TURNS

FEWEST_PROMPTS = 4  # decoded in a turn
_PROMPTS_PER_REQUEST = 2  # in flight: with as many prompts as are in flight, intervals of 95 % miss in 13 to 18 %
ABOVE_TAU = 1.05  # times tau: what noise may add to a speed-up
# Standard errors that repetitions leave on a log speed-up. Prompt by prompt, more are measured above the first if it is
# more than a quarter of the whole error. Turns of servers cost more, and are repeated above the second. What is above
# the second then, the machine decided.
STEADY, NOISY = 0.02, 0.05
_OF_WHOLE = 1 / 4
BUSY = 0.15  # of the CPU time, taken by others

PROMPTS, TURNS, TAU, NOISE, LOAD = "prompts", "turns", "tau", "noise", "load"
AGAIN = (TAU, NOISE)  # of the machine as it was: measured another time, they may be gone


@dataclass(frozen=True)
class Doubt:
    """What is wrong with the speeds at one setting."""

    kind: str  # PROMPTS, TURNS, TAU, NOISE; LOAD, which is of tokens/s alone: ratios hold
    said: str
    temperature: float
    concurrency: int
    arms: tuple[str, ...] = ()  # that it is about; empty: all


def doubts(
    turns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], settings: Sequence[Setting]
) -> list[dict[str, Any]]:
    """Return those of every setting, ready for JSON. turns, rows: of the tables `turns` and `requests`."""
    found = []
    for setting in settings:
        own, requests = at_setting(turns, setting), at_setting(rows, setting)
        each = (
            *_few(own, setting),
            *_above_tau(own, requests, setting),
            *_noisy(own, requests),
            *_busy(own),
        )
        for kind, said, *arms in each:
            found.append(asdict(Doubt(kind, said, setting.temperature, setting.concurrency, tuple(arms))))
    return found


def doubts_about(
    evaluation: Mapping[str, Any],
    setting: Mapping[str, Any],
    *arms: str,
    kinds: Collection[str] = (PROMPTS, TURNS, TAU, NOISE),
) -> list[str]:
    """Return what `evaluation["doubts"]` has on these arms at a setting (with `temperature` and `concurrency`)."""
    return [
        doubt["said"]
        for doubt in evaluation.get("doubts") or ()
        if doubt["kind"] in kinds
        and all(doubt[name] == setting[name] for name in ("temperature", "concurrency"))
        and (not doubt["arms"] or set(arms) & set(doubt["arms"]))
    ]


def fewest_prompts(concurrency: int) -> int:
    """Return how many prompts a turn needs: one with several requests in flight ends with its slowest."""
    return FEWEST_PROMPTS if concurrency == 1 else max(FEWEST_PROMPTS, _PROMPTS_PER_REQUEST * concurrency)


def few_turns(turns: int) -> str:
    """Return why nothing is judged by so many."""
    return f"{turns} turn{'s' * (turns != 1)}, {FEWEST_TURNS} are needed: raise evaluation.rounds"


def machine_errors(turns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return arm -> standard error of its log speed-up by what differs between repetitions, at one setting.

    Where arms alternate prompt by prompt, a repetition is the same prompt in another round; else it is a round. The
    prompts' own spread is not in it. Arms of which nothing is known (one round; two of whole turns) are left out.
    """
    by_prompt = alternates(turns)
    ratios: dict[str, list[np.ndarray]] = {}
    if by_prompt:
        seconds = {(row["arm"], row["prompt_id"], row["round"]): row["latency_seconds"] for row in rows}
        for arm, prompt in dict.fromkeys((arm, prompt) for arm, prompt, _ in seconds if arm != PLAIN):
            rounds = [n for a, p, n in seconds if (a, p) == (arm, prompt)]
            each = [math.log(seconds[PLAIN, prompt, n] / seconds[arm, prompt, n]) for n in rounds]
            ratios.setdefault(arm, []).append(np.array(each))
    else:
        ratios = {arm: [each] for arm, each in _by_round(turns, PLAIN).items()}
    found = {}
    for arm, own in ratios.items():
        if len(own[0]) >= (2 if by_prompt else 3):
            variance = float(np.mean([values.var(ddof=1) for values in own]))
            found[arm] = math.sqrt(variance / sum(map(len, own)))
    return found


def steady(turns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], settings: Sequence[Setting]) -> bool:
    """Return whether repetitions agree at all settings, so that no more of them are needed."""
    for setting in settings:
        own, requests = at_setting(turns, setting), at_setting(rows, setting)
        errors = machine_errors(own, requests)
        whole = log_ratios(own, requests, [(arm, PLAIN) for arm in errors], {})
        for arm, error in errors.items():
            if error > (max(STEADY, _OF_WHOLE * whole[arm, PLAIN].error) if alternates(own) else NOISY):
                return False
    return True


def _few(turns: Sequence[Mapping[str, Any]], setting: Setting) -> Iterator[tuple[str, ...]]:
    prompts, rounds = turns[0]["prompts"], len({turn["round"] for turn in turns})
    said, more = f"{prompts} prompt{'s' * (prompts != 1)} a turn", "raise evaluation.speed_prompts"
    if prompts < setting.concurrency:
        yield PROMPTS, f"{said} are never {setting.concurrency} in flight ({more})"
    elif prompts < (needed := FEWEST_TURNS if alternates(turns) else fewest_prompts(setting.concurrency)):
        several = f", {setting.concurrency} in flight," if setting.concurrency > 1 else ""
        yield PROMPTS, f"{said}{several} say little of others ({needed} are needed: {more})"
    if rounds < FEWEST_TURNS and not alternates(turns):
        yield TURNS, few_turns(rounds)


def _above_tau(
    turns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], setting: Setting
) -> Iterator[tuple[str, ...]]:
    """A verify step costs at least what a step of plain decoding costs, so no speed-up exceeds tau.

    Several requests at a time end when the slowest ends: then the best tau of a single request is the bound.
    """
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
                TAU,
                f"the speed-up of {arm} was measured as {speedup:.2f}, more than its acceptance length as served, "
                f"{bound:.2f}: the machine was not the same for both",
                arm,
            )


def _noisy(turns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    for arm, error in machine_errors(turns, rows).items():
        if error > NOISY:
            said = f"repetitions of the same prompts leave ±{1.96 * error:.0%} on the speed-up of {arm}"
            yield NOISE, f"{said}: the machine was too busy", arm


def _busy(turns: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    known = [share for turn in turns if (share := turn.get("others_share")) is not None]
    if known and (share := sum(known) / len(known)) > BUSY:
        yield LOAD, f"other programs took {share:.0%} of the CPU: tokens/s are lower than on a free machine"


def _by_round(turns: Sequence[Mapping[str, Any]], other: str) -> dict[str, np.ndarray]:
    """Arm -> [rounds] logarithm of how many times as fast it was as the other one in the same round."""
    speeds: dict[str, dict[int, float]] = {}
    for turn in turns:
        speeds.setdefault(turn["arm"], {})[turn["round"]] = math.log(turn["tokens"] / turn["wall_seconds"])
    beside = speeds.pop(other, {})
    return {arm: np.array([by[n] - beside[n] for n in sorted(by) if n in beside]) for arm, by in speeds.items()}
