"""The verification trace that replay returns, and statistics of the traces of many answers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np


@dataclass(frozen=True)
class Trace:
    """The verify steps of one trajectory (S steps, K = block_size-1 proposals)."""

    length: int  # tokens in the trajectory
    anchors: np.ndarray  # [S] int, absolute positions
    accepted: np.ndarray  # [S] int, proposals accepted
    proposed: np.ndarray  # [S, K] int
    evaluated_blocks: int  # work: blocks drafted to find the trace
    expected: np.ndarray | None = None  # [S] float64 tokens committed, on average over samples; None: argmaxes
    outside_nucleus: int = 0  # committed tokens that the stated sampling leaves out; counted if proposals are sampled
    confidence: np.ndarray | None = None  # [S, K] float32 logits, meaningful for proposals `on_trajectory`

    @property
    def judged(self) -> np.ndarray:
        """Return [S] numbers of proposals that lie inside the trajectory; others are neither accepted nor rejected."""
        return np.minimum(self.proposed.shape[1], self.length - 1 - self.anchors)

    @property
    def committed(self) -> np.ndarray:
        """Return [S] tokens that each step committed: the accepted ones and one more, unless the end cut the step."""
        return np.minimum(self.accepted + 1, self.length - 1 - self.anchors)

    @property
    def expected_committed(self) -> np.ndarray:
        """Return [S] what `committed` is on average over the samples after each anchor.

        Its sum is the less noisy estimate of tau: a trace with more steps than usual is one whose random numbers cut
        the steps short.
        """
        return self.committed if self.expected is None else self.expected

    @property
    def on_trajectory(self) -> np.ndarray:
        """Return [S] numbers of proposals after a prefix of the trajectory: the accepted and the first rejected one."""
        return np.minimum(self.accepted + 1, self.judged)

    @property
    def rejected_offset(self) -> np.ndarray:
        """Return [S] the offset of the first rejected proposal, 0 where nothing was rejected."""
        return np.where(self.accepted < self.judged, self.accepted + 1, 0)


DEPTHS = ("depth:below-1k", "depth:1k-4k", "depth:4k-16k", "depth:above-16k")  # of the anchor
DEPTH_ENDS = (1 << 10, 1 << 12, 1 << 14)  # tokens
EVERY = slice(None)


def depth_of(anchors: np.ndarray) -> np.ndarray:
    """Return for each anchor the index of its depth in `DEPTHS`."""
    return np.searchsorted(DEPTH_ENDS, anchors, side="right")


class Decisions(NamedTuple):
    """The confidence in D proposals whose predecessors were accepted, and whether they were accepted too."""

    logits: np.ndarray  # [D] float64, ascending
    accepted: np.ndarray  # [D] bool


class AcceptanceStats:
    """Sums and histograms over the traces of one drafter on N trajectories, which may come in any order."""

    def __init__(self, trajectories: int):
        self.committed = np.zeros(trajectories)  # [N] tokens that verify steps committed, on average if sampled
        self.steps = np.zeros(trajectories)  # [N] verify steps
        self.committed_at = np.zeros((trajectories, len(DEPTHS)))  # [N, depths] the same by depth of the anchor
        self.steps_at = np.zeros((trajectories, len(DEPTHS)))
        self.lengths: np.ndarray = np.zeros((trajectories, 0))  # [N, K + 2] steps by the number of committed tokens
        # [N, depths, K + 1] steps by the number of accepted proposals, and of proposals inside the trajectory
        self.accepted_at = self.judged_at = np.zeros((trajectories, len(DEPTHS), 0), dtype=np.int64)
        self._decisions: list[tuple[np.ndarray, np.ndarray]] = []  # of each trajectory
        # tokens that steps with sampled proposals committed, and those of them outside the nucleus
        self._sampled = self._outside = 0

    def add(self, indices: Iterable[int], traces: Iterable[Trace]) -> None:
        """Add the traces of the trajectories `indices`, each of them once."""
        for index, trace in zip(indices, traces, strict=True):
            size = trace.proposed.shape[1] + 1
            self.committed[index], self.steps[index] = trace.expected_committed.sum(), len(trace.anchors)
            depths = depth_of(trace.anchors)
            self.committed_at[index] = np.bincount(depths, trace.expected_committed, len(DEPTHS))
            self.steps_at[index] = np.bincount(depths, minlength=len(DEPTHS))
            if trace.expected is not None:
                self._sampled += int(trace.committed.sum())
                self._outside += trace.outside_nucleus
            if trace.confidence is not None:
                offsets = np.arange(size - 1)
                reached = offsets < trace.on_trajectory[:, None]
                self._decisions.append((trace.confidence[reached], (offsets < trace.accepted[:, None])[reached]))
            lengths = np.bincount(trace.committed, minlength=size + 1)
            if not self.lengths.size:
                self.lengths = np.zeros((len(self.steps), size + 1))
                self.accepted_at, self.judged_at = np.zeros((2, *self.steps_at.shape, size), dtype=np.int64)
            self.lengths[index] = lengths
            for histogram, counts in ((self.accepted_at, trace.accepted), (self.judged_at, trace.judged)):
                np.add.at(histogram[index], (depths, counts), 1)

    @property
    def block_size(self) -> int:
        return self.accepted_at.shape[-1]

    def acceptance_by_offset(self, answers: np.ndarray | slice = EVERY, depths: slice = EVERY) -> list[float]:
        """Return for each offset the share of its proposals that are accepted, and all before them; at most [K].

        Of all steps, or of those of some answers at some depths. Offsets that none of them reaches are left out.
        """
        accepted, judged = (each[answers, depths].sum((0, 1)) for each in (self.accepted_at, self.judged_at))
        return [float(accepted[k:].sum() / judged[k:].sum()) for k in range(1, len(judged)) if judged[k:].any()]

    @property
    def decisions(self) -> Decisions:
        """Return what the traces say of the drafter's confidence, the same in whatever order they came."""
        parts = self._decisions or [(np.zeros(0), np.zeros(0, dtype=bool))]
        logits, accepted = (np.concatenate(each) for each in zip(*parts, strict=True))
        order = np.lexsort((accepted, logits))
        return Decisions(logits[order].astype(np.float64), accepted[order])

    @property
    def tau(self) -> float:
        """Committed tokens per verify step ("+1"); NaN without any step."""
        steps = float(self.steps.sum())
        return float(self.committed.sum()) / steps if steps else float("nan")

    def at_width(self, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return [N] committed tokens and [N] verify steps, whose ratio estimates tau of blocks of `width` tokens.

        A block that was accepted up to some token would have been so from a later anchor in it too. So its first
        `width` tokens count as a step, and the following ones too if it was accepted so far, while they are whole.
        """
        if width >= self.block_size:
            return self.committed, self.steps
        lengths, starts = np.arange(self.lengths.shape[1]), width * np.arange(self.block_size // width)[:, None]
        tokens, steps = np.clip(lengths - starts, 0, width).sum(0), (lengths > starts).sum(0)
        return self.lengths @ tokens, self.lengths @ steps

    @property
    def outside_nucleus_share(self) -> float | None:
        """Share of the committed tokens that top-k and top-p leave out; None if no proposals are sampled."""
        return self._outside / self._sampled if self._sampled else None
