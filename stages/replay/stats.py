"""Acceptance statistics of traces, and the sequential reference of replay."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.replay.trace import Trace

DEPTHS = ("depth:below-1k", "depth:1k-4k", "depth:4k-16k", "depth:above-16k")  # of the anchor
DEPTH_ENDS = (1 << 10, 1 << 12, 1 << 14)  # tokens


def depth_of(anchors: np.ndarray) -> np.ndarray:
    """Return for each anchor the index of its depth in `DEPTHS`."""
    return np.searchsorted(DEPTH_ENDS, anchors, side="right")


class AcceptanceStats:
    """Sums and histograms over the traces of one drafter on N trajectories, which may come in any order."""

    def __init__(self, trajectories: int):
        self.committed = np.zeros(trajectories)  # [N] tokens that verify steps committed, on average if sampled
        self.steps = np.zeros(trajectories)  # [N] verify steps
        self.committed_at = np.zeros((trajectories, len(DEPTHS)))  # [N, depths] the same by depth of the anchor
        self.steps_at = np.zeros((trajectories, len(DEPTHS)))
        self.accepted = np.zeros(0, dtype=np.int64)  # [K + 1] steps by the number of accepted proposals
        self.judged = np.zeros(0, dtype=np.int64)  # [K + 1] steps by the number of proposals inside the trajectory
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
            accepted, judged = (np.bincount(each, minlength=size) for each in (trace.accepted, trace.judged))
            if trace.expected is not None:
                self._sampled += int(trace.committed.sum())
                self._outside += trace.outside_nucleus
            first = len(self.accepted) == 0
            self.accepted, self.judged = (
                (accepted, judged) if first else (self.accepted + accepted, self.judged + judged)
            )

    @classmethod
    def from_traces(cls, traces: Sequence[Trace]) -> Self:
        """Return the statistics of all trajectories, whose traces are given in order."""
        stats = cls(len(traces))
        stats.add(range(len(traces)), traces)
        return stats

    @property
    def block_size(self) -> int:
        return len(self.accepted)

    @property
    def tau(self) -> float:
        """Committed tokens per verify step ("+1"); NaN without any step."""
        steps = float(self.steps.sum())
        return float(self.committed.sum()) / steps if steps else float("nan")

    @property
    def outside_nucleus_share(self) -> float | None:
        """Share of the committed tokens that top-k and top-p leave out; None if no proposals are sampled."""
        return self._outside / self._sampled if self._sampled else None


def replay_sequentially(
    drafter: Drafter, context: Context, trajectory: Trajectory, block_size: int, head: Head
) -> Trace:
    """Return the trace of a drafter, one block after the other: the reference that parallel replay must equal.

    context: of this trajectory alone (batch of one), over all its positions.
    """
    tokens, anchor = trajectory.tokens, trajectory.first_anchor
    device = head.weight.device
    anchors, accepted, proposed = [], [], []
    while anchor <= trajectory.last_anchor:
        block = drafter.propose(
            context,
            torch.tensor([[tokens[anchor]]], device=device),
            torch.tensor([[anchor]], device=device),
            block_size,
            head,
        )
        proposals = block[0, 0].tolist()
        matching = 0
        for proposal, token in zip(proposals, tokens[anchor + 1 :], strict=False):
            if proposal != token:
                break
            matching += 1
        anchors.append(anchor)
        accepted.append(matching)
        proposed.append(proposals)
        anchor += matching + 1
    return Trace(
        len(tokens),
        np.array(anchors, dtype=np.int64),
        np.array(accepted, dtype=np.int64),
        np.array(proposed, dtype=np.int64).reshape(len(anchors), block_size - 1),
        len(anchors),
    )
