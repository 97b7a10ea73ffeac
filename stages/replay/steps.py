"""Verify steps as columns: a trace, the rows of a table, or the anchors of a batch; and statistics of many answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch

Array = TypeVar("Array", np.ndarray, "torch.Tensor")
NO_TOKEN = -1  # fills a block that is shorter than others of its answer


@dataclass(frozen=True, eq=False)
class Steps(Generic[Array]):
    """The verify steps of one trajectory as arrays [S], or those at the anchors of a batch as tensors [B, A].

    Every step has K proposals. A step's values do not depend on the other steps.
    """

    length: int | Array  # tokens of the trajectory; [B, 1] in a batch
    anchors: Array  # absolute positions of the last committed tokens
    accepted: Array  # accepted proposals; never beyond the end of the trajectory
    proposed: Array  # [..., K] token ids; [..., 0] where only numbers are known
    target_logprobs: Array | None = None  # float32 [..., K] of the proposals, given those before them; NaN: not scored
    best_logprob: Array | None = None  # float32, target's best token at the rejection; NaN without one
    proposals: int | None = None  # K, if `proposed` has other columns: none, or a larger block's
    expected: Array | None = None  # float64 committed tokens, averaged over samples; None: argmaxes
    confidence: Array | None = None  # float32 [..., K] logits, meaningful for proposals `on_trajectory`
    evaluated_blocks: int = 0  # cost: blocks drafted to find the steps
    outside_nucleus: int = 0  # committed tokens outside the stated sampling's nucleus; counted if proposals are sampled

    def __len__(self) -> int:
        return len(self.anchors)

    @property
    def logprobs(self) -> Array:
        """Return `target_logprobs` of scored steps."""
        assert self.target_logprobs is not None, "the steps are not scored"
        return self.target_logprobs

    @property
    def width(self) -> int:
        """Return K."""
        return self.proposed.shape[-1] if self.proposals is None else self.proposals

    @property
    def judged(self) -> Array:
        """Return the numbers of proposals inside the trajectory; others are neither accepted nor rejected."""
        return (self.length - 1 - self.anchors).clip(None, self.width)

    @property
    def committed(self) -> Array:
        """Return the tokens that each step committed: the accepted ones and one more, unless the end cut the step."""
        return (self.accepted + 1).clip(None, self.length - 1 - self.anchors)

    @property
    def expected_committed(self) -> Array:
        """Return the mean of `committed` over the samples after each anchor.

        Its sum is the less noisy estimate of tau: a trace with more steps than usual is one whose random numbers cut
        the steps short.
        """
        return self.committed if self.expected is None else self.expected

    @property
    def on_trajectory(self) -> Array:
        """Return the numbers of proposals after a prefix of the trajectory: the accepted and the first rejected one."""
        return (self.accepted + 1).clip(None, self.judged)

    @property
    def rejected_offset(self) -> Array:
        """Return the offset of the first rejected proposal, 0 where nothing was rejected."""
        return (self.accepted + 1) * (self.accepted < self.judged)


def recorded_steps(length: int, rows: Sequence[tuple[int, int, Sequence[int], Sequence[float] | None]]) -> Steps:
    """Return the steps that an engine recorded one by one.

    length: tokens of prompt and answer. rows: per step the anchor, accepted count, proposals and the target's log-probs
    of the proposals, which are dropped unless all steps have them.
    """
    anchors, accepted, blocks, logprobs = zip(*rows, strict=True) if rows else ((), (), (), ())
    width = max(map(len, blocks), default=0)
    scored = None if None in logprobs or not rows else _matrix(logprobs, width, np.nan, np.float32)
    return Steps(
        length,
        np.array(anchors, dtype=np.int64),
        np.array(accepted, dtype=np.int64),
        _matrix(blocks, width, NO_TOKEN, np.int64),
        scored,
    )


def _matrix(rows: Sequence[Sequence[float]], width: int, fill: float, dtype: type) -> np.ndarray:
    """Return rows of at most `width` numbers as a matrix, filled on the right."""
    return np.array([[*row, *[fill] * (width - len(row))] for row in rows], dtype).reshape(len(rows), width)


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
        self.committed = np.zeros(trajectories)  # [N] tokens committed by verify steps; means if sampled
        self.steps = np.zeros(trajectories)  # [N] verify steps
        self.committed_at = np.zeros((trajectories, len(DEPTHS)))  # [N, depths] the same by depth of the anchor
        self.steps_at = np.zeros((trajectories, len(DEPTHS)))
        self.lengths: np.ndarray = np.zeros((trajectories, 0))  # [N, K + 2] steps by the number of committed tokens
        # [N, depths, K + 1] steps by the number of accepted proposals, and of proposals inside the trajectory
        self.accepted_at = self.judged_at = np.zeros((trajectories, len(DEPTHS), 0), dtype=np.int64)
        self._decisions: list[tuple[np.ndarray, np.ndarray]] = []  # per trajectory
        # tokens that steps with sampled proposals committed, and those of them outside the nucleus
        self._sampled = self._outside = 0

    def add(self, indices: Iterable[int], traces: Iterable[Steps]) -> None:
        """Add the traces of the trajectories `indices`, each of them once."""
        for index, trace in zip(indices, traces, strict=True):
            size = trace.proposed.shape[1] + 1
            self.committed[index], self.steps[index] = trace.expected_committed.sum(), len(trace)
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

        Counts the steps of these answers at these depths. Offsets that no step reaches are dropped.
        """
        accepted, judged = (counts[answers, depths].sum((0, 1)) for counts in (self.accepted_at, self.judged_at))
        return [float(accepted[k:].sum() / judged[k:].sum()) for k in range(1, len(judged)) if judged[k:].any()]

    @property
    def decisions(self) -> Decisions:
        """Return the confidence and outcome of the traces' proposals, in an order that does not depend on theirs."""
        parts = self._decisions or [(np.zeros(0), np.zeros(0, dtype=bool))]
        logits, accepted = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
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
        """Share of the committed tokens that top-k and top-p exclude; None if no proposals are sampled."""
        return self._outside / self._sampled if self._sampled else None
