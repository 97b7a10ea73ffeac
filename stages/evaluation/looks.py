"""Looks at the speed of a challenger: if one look cannot decide, the next measures more prompts and adds them.

An evaluation whose speed-up is neither measurably above the gate's threshold nor measurably below it is inconclusive,
and the next run from `evaluation` takes another look. Look k of K decodes the k-th `evaluation.speed_prompts` held-out
prompts, so the number of prompts is fixed before any result. Looks share the gate's error rate α by the spending
function α·∛(k/K) of Kim and DeMets (1987): that much of it may be spent up to look k. Most is spent at the first look,
since a refresh should rarely need another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from scipy.special import ndtr, stdtrit  # of scipy.stats, which takes a second to load

from draftsmith.artifacts.results.evaluation import PLAIN, EvaluationResult, Look
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import REQUESTS, TIMED_RUNS
from draftsmith.stages.data.stored_prompts import Prompt
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.evaluation.speed_warnings import AGAIN
from draftsmith.stages.evaluation.timed_runs import Row
from draftsmith.stages.evaluation.verdicts import estimate_of
from draftsmith.stages.runtime.statistics import CONFIDENCE, Estimate

MOST_LOOKS = 3
_POWER = 1 / 3  # exponent of the spending function
_GRID = np.linspace(-12.0, 12.0, 4801)  # sums of up to three standard normal values


def level_of(look: Look) -> float:
    """Return the level of one-sided bounds at this look."""
    return _levels(look.of)[look.number - 1]


@cache
def _levels(looks: int) -> list[float]:
    """Return the level of each look. Every look adds an independent part of the same size to the estimate.

    Lan and DeMets (1983): `density` is the density of the sum, without the cases in which an earlier look has passed.
    The bound of a look cuts off the tail that it may spend. Bounds become levels, which are used with Student's t
    (Jennison and Turnbull 2000, 3.8).
    """
    step = _GRID[1] - _GRID[0]
    normal = np.exp(-(_GRID**2) / 2) / math.sqrt(2 * math.pi)
    density, levels, before = normal, [], 0.0
    for number in range(1, looks + 1):
        spent = (1 - CONFIDENCE) * (number / looks) ** _POWER
        tail = (np.cumsum(density[::-1])[::-1] - density / 2) * step
        bound = float(np.interp(before - spent, -tail, _GRID))
        levels.append(float(ndtr(bound / math.sqrt(number))))
        density = np.convolve(np.where(bound > _GRID, density, 0.0), normal, mode="same") * step
        before = spent
    return levels


def decides(estimate: Estimate, wanted: float, level: float) -> bool | None:
    """Return whether a value is measurably above the threshold; None if its interval holds it.

    level: the level of each one-sided bound.
    """
    if not math.isfinite(estimate.error):
        return None
    high = estimate.upper(level)
    if 2 * estimate.value - high > wanted:
        return True
    return False if high <= wanted else None


def prompts_wanted(estimate: Estimate, wanted: float, level: float) -> float:
    """Return the total prompts that would decide if value and spread stayed the same; infinity at the threshold."""
    distance = abs(estimate.value - wanted)
    if not distance or not math.isfinite(estimate.error):
        return math.inf
    return float(estimate.units * (stdtrit(estimate.degrees, level) * estimate.error / distance) ** 2)


def needs_another(evaluation: EvaluationResult, min_speedup: float) -> bool:
    """Return whether the challenger's speed-up is undecided and a further look is left."""
    look = evaluation.look
    speedup, *_ = evaluation.compared("speed", evaluation.challenger, PLAIN)
    threshold = math.log(min_speedup) if min_speedup else -math.inf
    return look.number < look.of and decides(estimate_of(speedup), threshold, level_of(look)) is None


@dataclass(frozen=True)
class Looks:
    """The look that an evaluation takes, and the measurements of earlier ones."""

    number: int
    of: int
    prompts: Sequence[Prompt]  # prompts that this look decodes
    requests: Sequence[Row]  # requests of earlier looks, like `runs`
    runs: Sequence[Row]
    earlier: EvaluationResult | None = None

    @property
    def first_round(self) -> int:
        """Return the number of this look's first round: no other look has it."""
        return 1 + max((run["round"] for run in self.runs), default=-1)

    def chosen(self) -> tuple[dict[str, int], dict[str, dict[str, float]]] | None:
        """Return each drafter's block size, and tokens/s of the candidates, as the first look has chosen."""
        if self.earlier is None:
            return None
        sizes = {arm: speed.block_size for arm, speed in self.earlier.speed.items() if speed.block_size is not None}
        return sizes, {arm: dict(speeds) for arm, speeds in self.earlier.block_size_candidates.items()}


def open_look(config: EvaluationConfig, heldout: Sequence[Prompt], earlier: Path | None) -> Looks:
    """Return the look to take: the one after the `earlier` evaluation's, or the same again if that was unreliable.

    earlier: the inconclusive artifact that this evaluation replaces; None: there is none.
    """
    size = config.speed_prompts
    of = 1 if config.min_speedup is None else max(1, min(MOST_LOOKS, len(heldout) // size))
    before = EvaluationResult.read(earlier) if earlier is not None else None
    number = 1
    if before is not None:
        again = any(warning.kind in AGAIN for warning in before.speed_warnings)
        number = min(of, before.look.number + (not again))
    requests: list[Row] = []
    runs: list[Row] = []
    if earlier is not None and number > 1:
        kept = {prompt.prompt_id for prompt in heldout[: (number - 1) * size]}
        requests = [r for r in read_table(earlier / "requests.parquet", REQUESTS).to_pylist() if r["prompt_id"] in kept]
        rounds = {row["round"] for row in requests}
        runs = [run for run in read_table(earlier / "turns.parquet", TIMED_RUNS).to_pylist() if run["round"] in rounds]
    prompts = heldout[(number - 1) * size : number * size]
    return Looks(number, of, prompts, requests, runs, before if number > 1 else None)
