"""Speed warnings: which speeds of an evaluation cannot be trusted, and why. For the gate such speeds are inconclusive.

Arms are compared on the same prompts, so effects of the machine on all arms cancel. The rest is checked
here: too few prompts or timed runs, a speed-up that is impossible, and repetitions of the same comparison that
differ so much that the machine decides the result. The last two are measured again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from draftsmith.artifacts.results.evaluation import SpeedWarning
from draftsmith.stages.evaluation.repetitions import NOISY, log_speeds_by_round, machine_errors
from draftsmith.stages.evaluation.speed_table import alternates, at_setting
from draftsmith.stages.evaluation.timed_runs import Row, Setting
from draftsmith.stages.evaluation.verdicts import FEWEST_RUNS

FEWEST_PROMPTS = 4  # in a timed run
_PROMPTS_PER_REQUEST = 2  # in flight: with one per request, 95 % intervals miss in 13 to 18 % of cases
ABOVE_TAU = 1.05  # times tau: what noise may add to a speed-up
BUSY = 0.15  # share of the CPU time of other programs

# Kinds of warnings. LOAD concerns only tokens/s: ratios hold.
PROMPTS, TIMED_RUNS, TAU, NOISE, LOAD = "prompts", "turns", "tau", "noise", "load"
AGAIN = (TAU, NOISE)  # temporary: another measurement may be free of them


def speed_warnings(runs: Sequence[Row], requests: Sequence[Row], settings: Sequence[Setting]) -> list[SpeedWarning]:
    """Return the warnings about every setting."""
    warnings = []
    for setting in settings:
        timed, own_requests = at_setting(runs, setting), at_setting(requests, setting)
        checks = (
            *_few(timed, setting),
            *_above_tau(timed, own_requests, setting),
            *_noisy(timed, own_requests),
            *_busy(timed),
        )
        for kind, text, *arms in checks:
            where = {"temperature": setting.temperature, "concurrency": setting.concurrency}
            warnings.append(SpeedWarning.model_validate({"kind": kind, "text": text, **where, "arms": arms}))
    return warnings


def fewest_prompts(concurrency: int) -> int:
    """Return the prompts that a timed run needs: with several requests in flight it ends with its slowest."""
    return FEWEST_PROMPTS if concurrency == 1 else max(FEWEST_PROMPTS, _PROMPTS_PER_REQUEST * concurrency)


def few_runs(runs: int) -> str:
    """Return why this number of timed runs is inconclusive."""
    return f"{runs} timed run{'s' * (runs != 1)}, {FEWEST_RUNS} are needed: raise evaluation.rounds"


def _few(runs: Sequence[Row], setting: Setting) -> Iterator[tuple[str, ...]]:
    prompts, rounds = runs[0]["prompts"], len({run["round"] for run in runs})
    text, remedy = f"{prompts} prompt{'s' * (prompts != 1)} in a timed run", "raise evaluation.speed_prompts"
    if prompts < setting.concurrency:
        yield PROMPTS, f"{text} are never {setting.concurrency} in flight ({remedy})"
    elif prompts < (needed := FEWEST_RUNS if alternates(runs) else fewest_prompts(setting.concurrency)):
        several = f" with {setting.concurrency} in flight" if setting.concurrency > 1 else ""
        yield PROMPTS, f"{text}{several} are too few ({needed} are needed: {remedy})"
    if rounds < FEWEST_RUNS and not alternates(runs):
        yield TIMED_RUNS, few_runs(rounds)


def _above_tau(runs: Sequence[Row], requests: Sequence[Row], setting: Setting) -> Iterator[tuple[str, ...]]:
    """Yield the arms whose speed-up exceeds tau.

    A verify step costs at least as much as a step without a drafter, so no speed-up exceeds tau. Several requests in
    flight end when the slowest ends: then the best tau of a single request is the bound.
    """
    for arm, ratios in log_speeds_by_round(runs).items():
        timed = [run for run in runs if run["arm"] == arm]
        steps = sum(run["verify_steps"] for run in timed)
        if not steps:
            continue
        bound = sum(run["tokens"] - run["prompts"] for run in timed) / steps
        if setting.concurrency > 1:
            single = [(r["tokens"] - 1) / r["verify_steps"] for r in requests if r["arm"] == arm and r["verify_steps"]]
            bound = max([bound, *single])
        speedup = math.exp(float(np.mean(ratios)))
        if speedup > ABOVE_TAU * bound:
            yield (
                TAU,
                f"the speed-up of {arm} was measured as {speedup:.2f}, more than its acceptance length as served, "
                f"{bound:.2f}: the machine was not the same for both",
                arm,
            )


def _noisy(runs: Sequence[Row], requests: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    for arm, error in machine_errors(runs, requests).items():
        if error > NOISY:
            text = f"repetitions of the same prompts leave ±{1.96 * error:.0%} on the speed-up of {arm}"
            yield NOISE, f"{text}: the machine was too busy", arm


def _busy(runs: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    known = [share for run in runs if (share := run.get("others_share")) is not None]
    if known and (share := sum(known) / len(known)) > BUSY:
        yield LOAD, f"other programs took {share:.0%} of the CPU: tokens/s are lower than on a free machine"
