"""The verification trace that replay returns, and tau."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

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

    @property
    def judged(self) -> np.ndarray:
        """[S] proposals that lie inside the trajectory; others are neither accepted nor rejected."""
        return np.minimum(self.proposed.shape[1], self.length - 1 - self.anchors)

    @property
    def committed(self) -> np.ndarray:
        """[S] tokens committed by each step: the accepted ones and one more, unless the end cut the step."""
        return np.minimum(self.accepted + 1, self.length - 1 - self.anchors)

    @property
    def expected_committed(self) -> np.ndarray:
        """[S] the same on average over the samples after each anchor.

        Its sum is the less noisy estimate of tau: a trace with more steps than usual is one whose random numbers cut
        the steps short.
        """
        return self.committed if self.expected is None else self.expected

    @property
    def on_trajectory(self) -> np.ndarray:
        """[S] proposals whose prefix is the trajectory itself: the accepted ones and the first rejected one."""
        return np.minimum(self.accepted + 1, self.judged)

    @property
    def rejected_offset(self) -> np.ndarray:
        """[S] offset of the first rejected proposal, 0 where nothing was rejected."""
        return np.where(self.accepted < self.judged, self.accepted + 1, 0)


def tau(traces: Iterable[Trace]) -> float:
    """Return the acceptance length: committed tokens per verify step, with the target's own token ("+1")."""
    traces = list(traces)
    steps = sum(len(t.anchors) for t in traces)
    return float(sum(t.expected_committed.sum() for t in traces) / steps) if steps else float("nan")
