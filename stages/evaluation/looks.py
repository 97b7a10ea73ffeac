"""Looks at the speed of a challenger: where one look cannot decide, the next measures more prompts and adds them.

An evaluation whose speed-up is neither measurably above the gate's threshold nor measurably below it is inconclusive,
and the next run of the same command takes another look. Looks share the gate's error rate: the first may spend half of
it, the others the rest in equal parts (Bonferroni, so the whole rate holds however the looks depend on each other).
Look k decodes the k-th `evaluation.speed_prompts` held-out prompts, so their number is fixed before anything is seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from scipy.special import stdtrit  # of scipy.stats, which takes a second to load

from draftsmith.artifacts.results.evaluation import PLAIN, EvaluationResult, Look
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import REQUESTS, TURNS
from draftsmith.stages.data.trajectories import Prompt
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.evaluation.timed_runs import Row
from draftsmith.stages.evaluation.validity import AGAIN
from draftsmith.stages.evaluation.verdicts import estimate_of
from draftsmith.stages.runtime.statistics import CONFIDENCE, Estimate

MOST_LOOKS = 3
_FIRST_SHARE = 0.5  # of the error rate


def level_of(look: Look) -> float:
    """Return the level of one-sided bounds at this look."""
    if look.of == 1:
        return CONFIDENCE
    share = _FIRST_SHARE if look.number == 1 else (1 - _FIRST_SHARE) / (look.of - 1)
    return 1 - (1 - CONFIDENCE) * share


def decides(estimate: Estimate, wanted: float, level: float) -> bool | None:
    """Return whether a value is measurably above the threshold; None if its interval holds it.

    level: of each one-sided bound.
    """
    if not math.isfinite(estimate.error):
        return None
    high = estimate.upper(level)
    if 2 * estimate.value - high > wanted:
        return True
    return False if high <= wanted else None


def prompts_wanted(estimate: Estimate, wanted: float, level: float) -> float:
    """Return how many prompts in all would decide if value and spread stayed the same; infinity at the threshold."""
    distance = abs(estimate.value - wanted)
    if not distance or not math.isfinite(estimate.error):
        return math.inf
    return float(estimate.units * (stdtrit(estimate.degrees, level) * estimate.error / distance) ** 2)


def needs_another(evaluation: EvaluationResult, min_speedup: float) -> bool:
    """Return whether the challenger's speed-up is undecided and a further look is left."""
    look = evaluation.look
    speedup, *_ = evaluation.compared("speed", evaluation.challenger, PLAIN)
    wanted = math.log(min_speedup) if min_speedup else -math.inf
    return look.number < look.of and decides(estimate_of(speedup), wanted, level_of(look)) is None


@dataclass(frozen=True)
class Looks:
    """The look that an evaluation takes, and what earlier ones measured."""

    number: int
    of: int
    prompts: Sequence[Prompt]  # that this look decodes
    requests: Sequence[Row]  # of earlier looks, as `runs`
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
    """Return the look to take: the one after that of the `earlier` evaluation, or its own again if that was unreliable.

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
        runs = [run for run in read_table(earlier / "turns.parquet", TURNS).to_pylist() if run["round"] in rounds]
    prompts = heldout[(number - 1) * size : number * size]
    return Looks(number, of, prompts, requests, runs, before if number > 1 else None)
