"""Whether repetitions of the same comparison agree, or the machine decides its result."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from draftsmith.artifacts.results.evaluation import PLAIN
from draftsmith.stages.evaluation.speed_table import alternates, at_setting, log_ratios
from draftsmith.stages.evaluation.timed_runs import Row, Setting

# Standard errors that repetitions leave on a log speed-up. Prompt by prompt, more are measured above the first if it is
# more than a quarter of the whole error. Runs of servers cost more, and are repeated above the second. If the
# error is still above the second, the machine decided the result.
STEADY, NOISY = 0.02, 0.05
_OF_WHOLE = 1 / 4


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
            log_speeds = [math.log(seconds[PLAIN, prompt, n] / seconds[arm, prompt, n]) for n in rounds]
            ratios.setdefault(arm, []).append(np.array(log_speeds))
    else:
        ratios = {arm: [log_speeds] for arm, log_speeds in log_speeds_by_round(runs).items()}
    errors = {}
    for arm, arm_ratios in ratios.items():
        if len(arm_ratios[0]) >= (2 if by_prompt else 3):
            variance = float(np.mean([values.var(ddof=1) for values in arm_ratios]))
            errors[arm] = math.sqrt(variance / sum(map(len, arm_ratios)))
    return errors


def steady(runs: Sequence[Row], requests: Sequence[Row], settings: Sequence[Setting]) -> bool:
    """Return whether repetitions agree at all settings, so that no more of them are needed."""
    for setting in settings:
        setting_runs, setting_requests = at_setting(runs, setting), at_setting(requests, setting)
        errors = machine_errors(setting_runs, setting_requests)
        whole = log_ratios(setting_runs, setting_requests, [(arm, PLAIN) for arm in errors], {})
        for arm, error in errors.items():
            if error > (max(STEADY, _OF_WHOLE * whole[arm, PLAIN].error) if alternates(setting_runs) else NOISY):
                return False
    return True


def log_speeds_by_round(runs: Sequence[Row]) -> dict[str, np.ndarray]:
    """Return arm -> [rounds] logarithm of its speed-up over decoding without a drafter in the same round."""
    speeds: dict[str, dict[int, float]] = {}
    for run in runs:
        speeds.setdefault(run["arm"], {})[run["round"]] = math.log(run["tokens"] / run["wall_seconds"])
    reference = speeds.pop(PLAIN, {})
    return {
        arm: np.array([by_round[n] - reference[n] for n in sorted(by_round) if n in reference])
        for arm, by_round in speeds.items()
    }
