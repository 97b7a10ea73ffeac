"""Speed warnings: which speeds of an evaluation cannot be trusted, and why. For the gate such speeds are inconclusive.

Arms are compared on the same prompts, so effects of the machine on all arms cancel. The rest is checked
here: too few prompts or timed runs, a speed-up that is impossible, and repetitions of the same comparison that
differ so much that the machine decides the result. The last two are measured again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from draftsmith.artifacts.results.evaluation import PLAIN, SpeedWarning
from draftsmith.stages.evaluation.speed_table import alternates, at_setting, log_ratios
from draftsmith.stages.evaluation.timed_runs import Row, Setting
from draftsmith.stages.evaluation.verdicts import FEWEST_RUNS

FEWEST_PROMPTS = 4  # in a timed run
_PROMPTS_PER_REQUEST = 2  # in flight: with one per request, 95 % intervals miss in 13 to 18 % of cases
ABOVE_TAU = 1.05  # times tau: what noise may add to a speed-up
# Standard errors that repetitions leave on a log speed-up. Prompt by prompt, more are measured above the first if it is
# more than a quarter of the whole error. Runs of servers cost more, and are repeated above the second. If the
# error is still above the second, the machine decided the result.
STEADY, NOISY = 0.02, 0.05
_OF_WHOLE = 1 / 4
BUSY = 0.15  # share of the CPU time of other programs

# Kinds of warnings. LOAD concerns only tokens/s: ratios hold.
PROMPTS, TURNS, TAU, NOISE, LOAD = "prompts", "turns", "tau", "noise", "load"
AGAIN = (TAU, NOISE)  # temporary: another measurement may be free of them


def speed_warnings(runs: Sequence[Row], requests: Sequence[Row], settings: Sequence[Setting]) -> list[SpeedWarning]:
    """Return the warnings about every setting."""
    found = []
    for setting in settings:
        own, own_requests = at_setting(runs, setting), at_setting(requests, setting)
        checks = (
            *_few(own, setting),
            *_above_tau(own, own_requests, setting),
            *_noisy(own, own_requests),
            *_busy(own),
        )
        for kind, text, *arms in checks:
            where = {"temperature": setting.temperature, "concurrency": setting.concurrency}
            found.append(SpeedWarning.model_validate({"kind": kind, "text": text, **where, "arms": arms}))
    return found


def fewest_prompts(concurrency: int) -> int:
    """Return the prompts that a timed run needs: with several requests in flight it ends with its slowest."""
    return FEWEST_PROMPTS if concurrency == 1 else max(FEWEST_PROMPTS, _PROMPTS_PER_REQUEST * concurrency)


def few_runs(runs: int) -> str:
    """Return why this number of timed runs is inconclusive."""
    return f"{runs} timed run{'s' * (runs != 1)}, {FEWEST_RUNS} are needed: raise evaluation.rounds"


def machine_errors(runs: Sequence[Row], requests: Sequence[Row]) -> dict[str, float]:
    """Return arm -> standard error of its log speed-up from the differences between repetitions, at one setting.

    Where arms alternate prompt by prompt, a repetition is the same prompt in another round; otherwise it is a round.
    The spread of the prompts is not in it. Arms with too few repetitions (one round; two of whole runs) are skipped.
    """
    by_prompt = alternates(runs)
    ratios: dict[str, list[np.ndarray]] = {}
    if by_prompt:
        seconds = {(row["arm"], row["prompt_id"], row["round"]): row["latency_seconds"] for row in requests}
        for arm, prompt in dict.fromkeys((arm, prompt) for arm, prompt, _ in seconds if arm != PLAIN):
            rounds = [n for a, p, n in seconds if (a, p) == (arm, prompt)]
            each = [math.log(seconds[PLAIN, prompt, n] / seconds[arm, prompt, n]) for n in rounds]
            ratios.setdefault(arm, []).append(np.array(each))
    else:
        ratios = {arm: [each] for arm, each in _by_round(runs, PLAIN).items()}
    found = {}
    for arm, own in ratios.items():
        if len(own[0]) >= (2 if by_prompt else 3):
            variance = float(np.mean([values.var(ddof=1) for values in own]))
            found[arm] = math.sqrt(variance / sum(map(len, own)))
    return found


def steady(runs: Sequence[Row], requests: Sequence[Row], settings: Sequence[Setting]) -> bool:
    """Return whether repetitions agree at all settings, so that no more of them are needed."""
    for setting in settings:
        own, own_requests = at_setting(runs, setting), at_setting(requests, setting)
        errors = machine_errors(own, own_requests)
        whole = log_ratios(own, own_requests, [(arm, PLAIN) for arm in errors], {})
        for arm, error in errors.items():
            if error > (max(STEADY, _OF_WHOLE * whole[arm, PLAIN].error) if alternates(own) else NOISY):
                return False
    return True


def _few(runs: Sequence[Row], setting: Setting) -> Iterator[tuple[str, ...]]:
    prompts, rounds = runs[0]["prompts"], len({run["round"] for run in runs})
    text, remedy = f"{prompts} prompt{'s' * (prompts != 1)} in a timed run", "raise evaluation.speed_prompts"
    if prompts < setting.concurrency:
        yield PROMPTS, f"{text} are never {setting.concurrency} in flight ({remedy})"
    elif prompts < (needed := FEWEST_RUNS if alternates(runs) else fewest_prompts(setting.concurrency)):
        several = f" with {setting.concurrency} in flight" if setting.concurrency > 1 else ""
        yield PROMPTS, f"{text}{several} are too few ({needed} are needed: {remedy})"
    if rounds < FEWEST_RUNS and not alternates(runs):
        yield TURNS, few_runs(rounds)


def _above_tau(runs: Sequence[Row], requests: Sequence[Row], setting: Setting) -> Iterator[tuple[str, ...]]:
    """Yield the arms whose speed-up exceeds tau.

    A verify step costs at least as much as a step without a drafter, so no speed-up exceeds tau. Several requests in
    flight end when the slowest ends: then the best tau of a single request is the bound.
    """
    for arm, ratios in _by_round(runs, PLAIN).items():
        own = [run for run in runs if run["arm"] == arm]
        steps = sum(run["verify_steps"] for run in own)
        if not steps:
            continue
        bound = sum(run["tokens"] - run["prompts"] for run in own) / steps
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


def _by_round(runs: Sequence[Row], other: str) -> dict[str, np.ndarray]:
    """Return arm -> [rounds] logarithm of its speed over the other arm's in the same round."""
    speeds: dict[str, dict[int, float]] = {}
    for run in runs:
        speeds.setdefault(run["arm"], {})[run["round"]] = math.log(run["tokens"] / run["wall_seconds"])
    reference = speeds.pop(other, {})
    return {
        arm: np.array([by_round[n] - reference[n] for n in sorted(by_round) if n in reference])
        for arm, by_round in speeds.items()
    }
