"""Acceptance of drafters on the same answers, paired so that small differences show, and where it is lowest."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from scipy.special import expit

from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.evaluation import (
    ALL,
    CHAMPION,
    Acceptance,
    AnswerContext,
    ArmComparison,
    ConfidenceCalibration,
    ContextStep,
    Difference,
    EvaluationResult,
)
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.evaluation.verdicts import Pair, comparison, estimate_record, pairs, too_small
from draftsmith.stages.replay.steps import DEPTHS, EVERY, AcceptanceStats, Decisions, Steps, depth_of
from draftsmith.stages.runtime.statistics import (
    Estimate,
    jackknife,
    ratio,
    ratio_difference,
    ratio_gain,
    strata_of,
    sum_by_key,
)


def has_loop(tokens: Sequence[int]) -> bool:
    """Return whether the answer repeats six tokens three times; its tau is then untypical."""
    grams = Counter(zip(*(tokens[k:] for k in range(6)), strict=False))
    return max(grams.values(), default=0) >= 3


def acceptance_table(
    tallies: Mapping[str, AcceptanceStats], prompts: Units, looping: Sequence[bool]
) -> dict[str, Acceptance]:
    """Return the metrics of each drafter, with 95 % intervals over prompts; differences to others are paired.

    looping: whether each answer repeats itself. A single prompt has no interval.
    """
    keep = ~np.asarray(looping)
    differences, table = {}, {}
    for pair, estimate in tau_differences(tallies, prompts).items():
        low, high = estimate.interval() or (None, None)
        differences[pair] = Difference(value=estimate.value, low=low, high=high)
    for name, tally in tallies.items():
        tau = jackknife(ratio, *_by_prompt(tally, prompts), strata=strata_of(prompts))
        low, high = tau.interval() or (None, None)
        table[name] = Acceptance(
            tau=tau.value,
            tau_low=low,
            tau_high=high,
            tau_degrees=tau.degrees,
            prompts=tau.units,
            verify_steps=int(tally.steps.sum()),
            block_size=tally.block_size,
            acceptance_by_offset=tally.acceptance_by_offset(),
            accepted_histogram=tally.accepted_at.sum((0, 1)).tolist(),
            tau_without_loops=float(tally.committed[keep].sum() / tally.steps[keep].sum()) if keep.any() else None,
            differences={other: difference for (arm, other), difference in differences.items() if arm == name},
        )
    return table


def tau_differences(tallies: Mapping[str, AcceptanceStats], prompts: Units) -> dict[Pair, Estimate]:
    """Return `tau_difference` of each compared pair."""
    return {(arm, other): tau_difference(tallies[arm], tallies[other], prompts) for arm, other in pairs(list(tallies))}


def tau_difference(tally: AcceptanceStats, other: AcceptanceStats, prompts: Units) -> Estimate:
    """Return a drafter's tau minus another's on the same answers, paired over prompts."""
    sums = (*_by_prompt(tally, prompts), *_by_prompt(other, prompts))
    return jackknife(ratio_difference, *sums, strata=strata_of(prompts))


Sums: TypeAlias = tuple[np.ndarray, np.ndarray]  # committed tokens and verify steps of each prompt, or of each answer
Units: TypeAlias = Sequence[Hashable]  # per answer, the unit of its prompt (`independent_units`)
Labels: TypeAlias = Sequence[Sequence[str]]  # per answer: its prompt set, then its labels


class Slice(NamedTuple):
    """Some answers, or their verify steps at some depth."""

    name: str | None  # None: everything
    sums: Mapping[str, Sums]  # drafter -> [prompts]
    strata: Sequence[Hashable]  # [prompts]
    by_offset: Mapping[str, Sequence[float]]  # drafter -> `AcceptanceStats.acceptance_by_offset`


def slice_names(labels: Labels) -> list[str]:
    """Return the prompt sets in the order of the answers, then all other labels."""
    others = sorted({name for names in labels for name in names[1:]})
    return list(dict.fromkeys([*(names[0] for names in labels), *others]))


def slices(tallies: Mapping[str, AcceptanceStats], prompts: Units, labels: Labels) -> Iterator[Slice]:
    """Yield everything, each label, and each depth if there are several.

    A slice has the answers in which every drafter has a verify step there.
    """

    def slice_of(name: str | None, sums: Mapping[str, Sums], depths: slice = EVERY) -> Slice | None:
        indices = np.flatnonzero(np.all([steps > 0 for _, steps in sums.values()], axis=0))
        chosen = [prompts[int(index)] for index in indices]
        tallied = {
            arm: (sum_by_key(chosen, committed[indices]), sum_by_key(chosen, steps[indices]))
            for arm, (committed, steps) in sums.items()
        }
        by_offset = {arm: tally.acceptance_by_offset(indices, depths) for arm, tally in tallies.items()}
        return Slice(name, tallied, strata_of(chosen), by_offset) if chosen else None

    masks: dict[str | None, np.ndarray] = {None: np.ones(len(labels))}
    masks |= {name: np.array([float(name in row) for row in labels]) for name in slice_names(labels)}
    by_label = [
        slice_of(name, {arm: (tally.committed * mask, tally.steps * mask) for arm, tally in tallies.items()})
        for name, mask in masks.items()
    ]
    by_depth = [
        slice_of(
            name,
            {arm: (tally.committed_at[:, depth], tally.steps_at[:, depth]) for arm, tally in tallies.items()},
            slice(depth, depth + 1),
        )
        for depth, name in enumerate(DEPTHS)
    ]
    several = sum(item is not None for item in by_depth) > 1
    yield from (item for item in [*by_label, *(by_depth if several else ())] if item is not None)


def tau_by_slice(
    tallies: Mapping[str, AcceptanceStats], prompts: Units, labels: Labels
) -> dict[str, dict[str, SetMetrics]]:
    """Return slice -> drafter -> tau with its 95 % interval over prompts; `ALL` stands for all prompts.

    A slice that is too small has no interval.
    """
    taus: dict[str, dict[str, SetMetrics]] = {}
    for part in slices(tallies, prompts, labels):
        for arm, sums in part.sums.items():
            tau = jackknife(ratio, *sums, strata=part.strata)
            interval = tau.interval() if part.name is None or not too_small(tau) else None
            low, high = interval or (None, None)
            metrics = SetMetrics(tau=tau.value, low=low, high=high, prompts=tau.units)
            taus.setdefault(part.name or ALL, {})[arm] = metrics
    return taus


def tau_comparisons(tallies: Mapping[str, AcceptanceStats], prompts: Units, labels: Labels) -> list[ArmComparison]:
    """Compare every drafter with the champion, on all prompts (set None) and each slice; empty without a champion."""
    if CHAMPION not in tallies:
        return []
    comparisons = []
    for part in slices(tallies, prompts, labels):
        champion = part.sums[CHAMPION]
        base = float(ratio(*(sums.sum() for sums in champion)))
        for arm, arm_sums in part.sums.items():
            if arm != CHAMPION:
                gain = estimate_record(jackknife(ratio_gain, *arm_sums, *champion, strata=part.strata))
                difference = jackknife(ratio_difference, *arm_sums, *champion, strata=part.strata)
                comparisons.append(comparison("tau", (arm, CHAMPION), difference, set=part.name, base=base, gain=gain))
    return comparisons


def served_tallies(requests: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> dict[str, AcceptanceStats]:
    """Return the servers' counts per drafter: only committed tokens and verify steps.

    requests: rows of table `requests`, of the same prompts in the same order for every drafter.
    """
    tallies = {}
    for arm in arms:
        rows = [row for row in requests if row["arm"] == arm]
        tally = tallies[arm] = AcceptanceStats(len(rows))
        tally.committed[:] = [row["tokens"] - 1 for row in rows]  # prefill commits the first token
        steps = np.array([row["verify_steps"] for row in rows])
        tally.steps[:] = np.where(steps == 0, tally.committed, steps)  # nothing was drafted
    return tallies


def as_served(
    replayed: EvaluationResult, tallies: Mapping[str, AcceptanceStats], prompts: Units, labels: Labels
) -> EvaluationResult:
    """Return the result with tau, its differences and its slices as served, and replay's tau next to it."""
    counted = acceptance_table(tallies, prompts, [False] * len(prompts))
    fields = ("tau", "tau_low", "tau_high", "tau_degrees", "prompts", "verify_steps", "differences")
    drafters = {
        arm: drafter.model_copy(
            update={name: getattr(counted[arm], name) for name in fields} | {"tau_replayed": drafter.tau}
        )
        for arm, drafter in replayed.drafters.items()
    }
    sets = {name: arms for name, arms in tau_by_slice(tallies, prompts, labels).items() if name != ALL}
    comparisons = tau_comparisons(tallies, prompts, labels)
    return replayed.model_copy(update={"drafters": drafters, "sets": sets, "comparisons": comparisons})


def _by_prompt(tally: AcceptanceStats, prompts: Units) -> Sums:
    """Return [prompts] committed tokens and verify steps of the answers to each prompt."""
    return sum_by_key(prompts, tally.committed), sum_by_key(prompts, tally.steps)


STEPS = 6  # verify steps of a stretch
BEFORE, AFTER = 80, 16  # tokens around it
TYPICAL, OF_ANSWERS = 2, 64  # number of typical stretches, and of answers that they come from
OF_SLICE = 2  # worst stretches of each slice
Decode = Callable[[list[int]], str]
_Stretch = tuple[float, int, int, int, Steps]  # tau, index of the answer, first step, steps


class ContextCollector:
    """Collects the stretches with the fewest committed tokens per step, one per answer, and typical ones.

    Traces may come in any order. Each slice also has its worst stretches, at most one per answer.
    """

    def __init__(self, labels: Labels, count: int = 10):
        self.labels, self.count = labels, count
        self._worst: list[_Stretch] = []
        self._middle: list[_Stretch] = []  # per answer, its stretch of median tau
        self._by_slice: dict[str, list[_Stretch]] = {}

    def add(self, indices: Sequence[int], traces: Sequence[Steps]) -> None:
        """Add the traces of the answers at `indices`.

        Among equally bad answers the first ones are kept; within an answer, the first such stretch. An answer with
        fewer steps is taken as a whole, unless it has none.
        """
        for index, trace in zip(indices, traces, strict=True):
            steps = min(STEPS, len(trace))
            if steps:
                sums = np.convolve(trace.committed, np.ones(steps, dtype=np.int64), mode="valid")
                worst = int(sums.argmin())
                middle = int(np.argsort(sums, kind="stable")[len(sums) // 2])
                first_of = dict.fromkeys(self.labels[index], worst)
                depths = depth_of(trace.anchors[: len(sums)])
                for depth in np.unique(depths):
                    firsts = np.flatnonzero(depths == depth)
                    first_of[DEPTHS[depth]] = int(firsts[sums[firsts].argmin()])
                self._worst.append(_stretch(sums, worst, index, trace))
                self._middle.append(_stretch(sums, middle, index, trace))
                for name, first in first_of.items():
                    self._by_slice.setdefault(name, []).append(_stretch(sums, first, index, trace))
        for name, stretches in self._by_slice.items():
            self._by_slice[name] = sorted(stretches, key=_order)[:OF_SLICE]
        self._worst = sorted(self._worst, key=_order)[: self.count]
        self._middle = sorted(self._middle, key=lambda stretch: stretch[1])[:OF_ANSWERS]

    def contexts(self, trajectories: Sequence[Trajectory], decode: Decode) -> list[AnswerContext]:
        """Return the worst stretches first, then those of median tau, then the worst of each slice."""
        ordered = sorted(self._middle, key=_order)
        start = max(0, (len(ordered) - TYPICAL) // 2)
        label_names = [name for name in slice_names(self.labels) if name in self._by_slice]
        depth_names = [name for name in DEPTHS if name in self._by_slice]
        several = [name for names in (label_names, depth_names) if len(names) > 1 for name in names]
        groups: list[tuple[str, list[_Stretch], str | None]] = [("worst", self._worst, None)]
        groups += [("typical", ordered[start : start + TYPICAL], None)]
        groups += [("worst", self._by_slice[name], name) for name in several]
        return [
            _context(kind, stretch, trajectories[stretch[1]], self.labels[stretch[1]][0], name, decode)
            for kind, stretches, name in groups
            for stretch in stretches
        ]


def _stretch(sums: np.ndarray, first: int, index: int, trace: Steps) -> _Stretch:
    steps = min(STEPS, len(trace))
    return int(sums[first]) / steps, index, first, steps, trace


def _order(stretch: _Stretch) -> tuple[float, int, int]:
    return stretch[:3]


def _context(
    kind: str, stretch: _Stretch, trajectory: Trajectory, prompt_set: str, name: str | None, decode: Decode
) -> AnswerContext:
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
    context = AnswerContext(
        kind=kind,
        tau=tau,
        set=prompt_set,
        trajectory_id=trajectory.trajectory_id,
        position=start - trajectory.prompt_length,
        before=decode(tokens[max(0, start - BEFORE) : start]),
        steps=steps,
        after=decode(tokens[after : after + AFTER]),
    )
    return context if name is None else context.model_copy(update={"slice": name})


# -- confidence: a drafter's predicted probability of acceptance, against the outcome. A decision is a proposal whose
# predecessors in its block were all accepted: its logit, and whether it was accepted too.

_BINS = 15


def calibration(validation: Decisions, heldout: Decisions) -> ConfidenceCalibration | None:
    """Fit the correction on validation answers, and measure it on held-out ones; None if either has no decision."""
    if not (len(validation.logits) and len(heldout.logits)):
        return None
    scale, shift = fit(validation)
    before, after = expit(heldout.logits), expit(scale * heldout.logits + shift)
    return ConfidenceCalibration(
        scale=scale,
        shift=shift,
        fitted_on=len(validation.logits),
        decisions=len(heldout.logits),
        confidence=float(before.mean()),
        accepted=float(heldout.accepted.mean()),
        error=expected_calibration_error(before, heldout.accepted),
        error_calibrated=expected_calibration_error(after, heldout.accepted),
    )


def fit(decisions: Decisions) -> tuple[float, float]:
    """Return scale and shift of the logit with the least log-loss.

    Source: Platt 1999, "Probabilistic outputs for support vector machines", with its targets: (N₊ + 1) / (N₊ + 2) for
    the N₊ accepted proposals and 1 / (N₋ + 2) for the rejected ones, so that the minimum is finite.
    """
    from scipy.optimize import minimize  # here: it takes 0.12 s, also in `draftsmith status`

    logits, accepted = decisions.logits, decisions.accepted
    targets = np.where(accepted, 1 - 1 / (accepted.sum() + 2), 1 / ((~accepted).sum() + 2))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        corrected = parameters[0] * logits + parameters[1]
        excess = expit(corrected) - targets
        gradient = np.array([(excess * logits).mean(), excess.mean()])
        return float((np.logaddexp(0, corrected) - targets * corrected).mean()), gradient

    scale, shift = minimize(loss, [1.0, 0.0], jac=True, method="BFGS", options={"gtol": 1e-9}).x
    return float(scale), float(shift)


def expected_calibration_error(probabilities: np.ndarray, accepted: np.ndarray) -> float:
    """Return Σ_m |B_m| / n · |share accepted in B_m - mean probability in B_m| over 15 bins B_m of equal width.

    Bin m holds probabilities in ((m - 1) / 15, m / 15]. Source: Guo et al. 2017 (arXiv 1706.04599, equation 3), for the
    probability of acceptance where theirs is of the predicted class.
    """
    bins = np.clip(np.ceil(_BINS * probabilities).astype(int) - 1, 0, _BINS - 1)
    return float(np.abs(np.bincount(bins, accepted - probabilities)).sum() / len(probabilities))
