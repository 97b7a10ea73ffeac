"""What acceptance figures need of the traces of one drafter: two sums a trajectory, and histograms over all steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.replay.trace import Trace


class AcceptanceStats:
    """Of N trajectories; traces may come in any order, and need not be kept."""

    def __init__(self, trajectories: int):
        self.committed = np.zeros(trajectories)  # [N] tokens that verify steps committed, on average where drawn
        self.steps = np.zeros(trajectories)  # [N] verify steps
        self.accepted = np.zeros(0, dtype=np.int64)  # [K + 1] steps by proposals kept
        self.judged = np.zeros(0, dtype=np.int64)  # [K + 1] steps by proposals that lie inside the trajectory
        self._drawn = self._outside = 0  # tokens that drawn steps committed, and those outside the nucleus

    def add(self, indices: Iterable[int], traces: Iterable[Trace]) -> None:
        """Take the traces of the trajectories `indices`, each of them once."""
        for index, trace in zip(indices, traces, strict=True):
            size = trace.proposed.shape[1] + 1
            self.committed[index], self.steps[index] = trace.expected_committed.sum(), len(trace.anchors)
            accepted, judged = (np.bincount(each, minlength=size) for each in (trace.accepted, trace.judged))
            if trace.expected is not None:
                self._drawn += int(trace.committed.sum())
                self._outside += trace.outside_nucleus
            first = len(self.accepted) == 0
            self.accepted, self.judged = (
                (accepted, judged) if first else (self.accepted + accepted, self.judged + judged)
            )

    @classmethod
    def from_traces(cls, traces: Sequence[Trace]) -> Self:
        """Of all trajectories, in their order."""
        tally = cls(len(traces))
        tally.add(range(len(traces)), traces)
        return tally

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
        """Of the committed tokens; None where nothing is drawn."""
        return self._outside / self._drawn if self._drawn else None


def replay_sequentially(
    drafter: Drafter, context: Context, trajectory: Trajectory, block_size: int, head: Head
) -> Trace:
    """context: of this trajectory alone (batch of one), over all its positions."""
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
        kept = 0
        for proposal, token in zip(proposals, tokens[anchor + 1 :], strict=False):
            if proposal != token:
                break
            kept += 1
        anchors.append(anchor)
        accepted.append(kept)
        proposed.append(proposals)
        anchor += kept + 1
    return Trace(
        len(tokens),
        np.array(anchors, dtype=np.int64),
        np.array(accepted, dtype=np.int64),
        np.array(proposed, dtype=np.int64).reshape(len(anchors), block_size - 1),
        len(anchors),
    )
