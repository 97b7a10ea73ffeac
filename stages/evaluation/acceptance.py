"""Acceptance of drafters on the same answers: paired, so that small differences show, and where it was lowest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.evaluation import (
    CHAMPION,
    Acceptance,
    AnswerContext,
    ArmComparison,
    ContextStep,
    Difference,
)
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.evaluation.verdicts import Pair, comparison, estimate_record, pairs
from draftsmith.stages.replay.stats import AcceptanceStats
from draftsmith.stages.replay.trace import Trace
from draftsmith.stages.runtime.statistics import Estimate, jackknife, ratio, ratio_difference, ratio_gain, sum_by_key

_MULTIPLIER = np.uint64(6364136223846793005)  # odd; products wrap


def has_loop(tokens: Sequence[int], n: int = 6, times: int = 3) -> bool:
    """Return whether the answer repeats an n-gram `times` times (at least twice), so that its tau is untypical."""
    ids, count = np.asarray(tokens, dtype=np.uint64), len(tokens) - n + 1
    if count < times:
        return False
    hashes = np.zeros(count, dtype=np.uint64)
    for k in range(n):
        hashes = hashes * _MULTIPLIER + ids[k : k + count]
    hashes.sort()
    if not (hashes[times - 1 :] == hashes[: count - times + 1]).any():  # equal n-grams have equal hashes
        return False
    grams = Counter(tuple(tokens[i : i + n]) for i in range(count))
    return max(grams.values()) >= times


def acceptance_table(
    tallies: Mapping[str, AcceptanceStats], prompts: Sequence[str], looping: Sequence[bool]
) -> dict[str, Acceptance]:
    """Return the metrics of each drafter, with 95 % intervals over prompts; differences to others are paired.

    prompts, looping: for each answer, the id of its prompt, and whether it repeats itself. A single prompt has no
    interval.
    """
    keep = ~np.asarray(looping)
    differences = {pair: _difference(estimate) for pair, estimate in tau_differences(tallies, prompts).items()}
    table = {}
    for name, tally in tallies.items():
        tau = jackknife(ratio, *_by_prompt(tally, prompts))
        low, high = tau.interval() or (None, None)
        table[name] = Acceptance(
            tau=tau.value,
            tau_low=low,
            tau_high=high,
            prompts=tau.units,
            verify_steps=int(tally.steps.sum()),
            block_size=tally.block_size,
            acceptance_by_offset=[
                float(tally.accepted[k:].sum() / max(1, tally.judged[k:].sum())) for k in range(1, tally.block_size)
            ],
            accepted_histogram=tally.accepted.tolist(),
            tau_without_loops=float(tally.committed[keep].sum() / tally.steps[keep].sum()) if keep.any() else None,
            differences={other: difference for (arm, other), difference in differences.items() if arm == name},
        )
    return table


def _difference(estimate: Estimate) -> Difference:
    low, high = estimate.interval() or (None, None)
    return Difference(value=estimate.value, low=low, high=high)


def tau_differences(tallies: Mapping[str, AcceptanceStats], prompts: Sequence[str]) -> dict[Pair, Estimate]:
    """Return `tau_difference` of each compared pair."""
    return {(arm, other): tau_difference(tallies[arm], tallies[other], prompts) for arm, other in pairs(list(tallies))}


def tau_difference(tally: AcceptanceStats, other: AcceptanceStats, prompts: Sequence[str] | None = None) -> Estimate:
    """Return tau of a drafter minus that of another one on the same answers, paired over prompts.

    prompts: the id of each answer's prompt; left out: every answer has its own.
    """
    prompts = [str(index) for index in range(len(tally.steps))] if prompts is None else prompts
    return jackknife(ratio_difference, *_by_prompt(tally, prompts), *_by_prompt(other, prompts))


def tau_by_set(
    tallies: Mapping[str, AcceptanceStats], prompts: Sequence[str], sets: Sequence[str]
) -> dict[str, dict[str, SetMetrics]]:
    """Return set -> drafter -> tau with its 95 % interval over prompts. sets: of each answer."""
    found: dict[str, dict[str, SetMetrics]] = {}
    for name in dict.fromkeys(sets):
        indices = _indices(sets, name)
        for arm, tally in tallies.items():
            tau = jackknife(ratio, *_by_prompt(tally, prompts, indices))
            low, high = tau.interval() or (None, None)
            found.setdefault(name, {})[arm] = SetMetrics(tau=tau.value, low=low, high=high, prompts=tau.units)
    return found


def tau_comparisons(
    tallies: Mapping[str, AcceptanceStats], prompts: Sequence[str], sets: Sequence[str]
) -> list[ArmComparison]:
    """Compare every drafter with the champion, on all prompts (set None) and on each set; empty without a champion."""
    if CHAMPION not in tallies:
        return []
    found = []
    for name in (None, *dict.fromkeys(sets)):
        indices = _indices(sets, name)
        champion = _by_prompt(tallies[CHAMPION], prompts, indices)
        base = float(ratio(*(sums.sum() for sums in champion)))
        for arm, tally in tallies.items():
            if arm != CHAMPION:
                own = _by_prompt(tally, prompts, indices)
                gain = estimate_record(jackknife(ratio_gain, *own, *champion))
                difference = jackknife(ratio_difference, *own, *champion)
                found.append(comparison("tau", (arm, CHAMPION), difference, set=name, base=base, gain=gain))
    return found


def _indices(sets: Sequence[str], name: str | None) -> np.ndarray:
    """Return the indices of the answers of one set; of all for None."""
    return np.array([index for index, each in enumerate(sets) if name is None or each == name], dtype=np.int64)


def _by_prompt(
    tally: AcceptanceStats, prompts: Sequence[str], indices: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return [prompts] committed tokens and verify steps of the answers to each prompt. indices: of some answers."""
    if indices is None:
        return sum_by_key(prompts, tally.committed), sum_by_key(prompts, tally.steps)
    chosen = [prompts[index] for index in indices]
    return sum_by_key(chosen, tally.committed[indices]), sum_by_key(chosen, tally.steps[indices])


STEPS = 6  # verify steps of a stretch
BEFORE, AFTER = 80, 16  # tokens around it
TYPICAL, OF_ANSWERS = 2, 64  # typical stretches that are shown, from so many answers
Decode = Callable[[list[int]], str]
_Stretch = tuple[float, int, int, int, Trace]  # tau, index of the answer, first step, steps


class ContextCollector:
    """Collects the stretches with the fewest committed tokens a step, one an answer, and typical ones.

    Traces may come in any order.
    """

    def __init__(self, count: int = 10):
        self.count = count
        self._worst: list[_Stretch] = []
        self._middle: list[_Stretch] = []  # of each answer, its stretch of median tau

    def add(self, indices: Sequence[int], traces: Sequence[Trace]) -> None:
        """Add the traces of the answers at `indices`.

        Of equally bad answers the first ones are kept, of an answer the first such stretch. An answer of fewer steps
        is taken as a whole, unless it has none.
        """
        for index, trace in zip(indices, traces, strict=True):
            steps = min(STEPS, len(trace.anchors))
            if steps:
                sums = np.convolve(trace.committed, np.ones(steps, dtype=np.int64), mode="valid")
                first = int(sums.argmin())
                self._worst.append((int(sums[first]) / steps, index, first, steps, trace))
                middle = int(np.argsort(sums, kind="stable")[len(sums) // 2])
                self._middle.append((int(sums[middle]) / steps, index, middle, steps, trace))
        self._worst = sorted(self._worst, key=lambda stretch: stretch[:4])[: self.count]
        self._middle = sorted(self._middle, key=lambda stretch: stretch[1])[:OF_ANSWERS]

    def contexts(self, trajectories: Sequence[Trajectory], sets: Sequence[str], decode: Decode) -> list[AnswerContext]:
        """Return the worst stretches first, then those of median tau. sets: the prompt set of each answer."""
        ordered = sorted(self._middle, key=lambda stretch: stretch[:4])
        start = max(0, (len(ordered) - TYPICAL) // 2)
        return [
            _context(kind, stretch, trajectories[stretch[1]], sets[stretch[1]], decode)
            for kind, stretches in (("worst", self._worst), ("typical", ordered[start : start + TYPICAL]))
            for stretch in stretches
        ]


def _context(kind: str, stretch: _Stretch, trajectory: Trajectory, prompt_set: str, decode: Decode) -> AnswerContext:
    """Return the text before a stretch, every verify step in it, and the text after it."""
    tau, _, first, count, trace = stretch
    tokens, start = trajectory.tokens, int(trace.anchors[first]) + 1
    steps = []
    for step in range(first, first + count):
        anchor, accepted = int(trace.anchors[step]), int(trace.accepted[step])
        verified, end = int(trace.judged[step]), anchor + 1 + int(trace.committed[step])
        rejected = [int(token) for token in trace.proposed[step, accepted:verified]]
        steps.append(
            ContextStep(
                accepted=decode(tokens[anchor + 1 : anchor + 1 + accepted]),
                rejected=decode(rejected[:1]),
                dropped=decode(rejected[1:]),
                chosen=decode(tokens[anchor + 1 + accepted : end]),
            )
        )
    after = int(trace.anchors[first + count - 1]) + 1 + int(trace.committed[first + count - 1])
    return AnswerContext(
        kind=kind,
        tau=tau,
        set=prompt_set,
        trajectory_id=trajectory.trajectory_id,
        position=start - trajectory.prompt_length,
        before=decode(tokens[max(0, start - BEFORE) : start]),
        steps=steps,
        after=decode(tokens[after : after + AFTER]),
    )
