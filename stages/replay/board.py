"""The bookkeeping of parallel replay: what is known of one trajectory, and where its chains go on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from draftsmith.stages.replay.trace import Trace, Trajectory

NOT_EVALUATED = -1
# A chain from any position joins the trace after a rejection or two. Two chains share a stretch only if at least this
# many are expected in it, so the blocks evaluated in vain stay a small share.
REJECTIONS_TO_SPLIT = 16
BLOCKS_TO_JUDGE = 8  # blocks seen before the rate of rejections is believed


def start_anchors(trajectory: Trajectory, chains: int) -> list[int]:
    """The first anchor, and further starts spread evenly over the response."""
    first, last = trajectory.first_anchor, trajectory.last_anchor
    if last < first:
        return []
    return sorted({first + (last + 1 - first) * c // chains for c in range(chains)})


@dataclass
class Pace:
    """How often the drafter is rejected in this batch, as far as it has been seen."""

    blocks: int = 0
    rejections: int = 0
    committed: int = 0

    def rejections_in(self, tokens: int) -> float:
        """Expected in a stretch of text. 0 while too little has been seen."""
        return tokens * self.rejections / self.committed if self.blocks >= BLOCKS_TO_JUDGE else 0.0


class Board:
    """The evaluated anchors of one trajectory, and its live chains: the anchors whose blocks are wanted next."""

    def __init__(self, trajectory: Trajectory, proposals: int, chains: int):
        self.length = len(trajectory.tokens)
        self.first, self.last = trajectory.first_anchor, trajectory.last_anchor
        self.live = start_anchors(trajectory, chains)
        self.accepted = np.full(self.length, NOT_EVALUATED, dtype=np.int64)
        self.proposed = np.zeros((self.length, proposals), dtype=np.int64)
        self.logprobs = np.full((self.length, proposals), np.nan, dtype=np.float32)
        self.expected: np.ndarray | None = None  # where proposals are drawn
        self.verified: np.ndarray | None = None  # where blocks are cut

    @property
    def filler(self) -> int:
        """An anchor that may be evaluated once more, where a batch needs one."""
        return self.live[0] if self.live else min(self.first, self.length - 1)

    def split(self, wanted: int, pace: Pace) -> None:
        """Start chains amid the longest stretches of unread text, until `wanted` are live or stretches are short."""
        while 0 < len(self.live) < wanted:
            known = np.append(np.flatnonzero(self.accepted != NOT_EVALUATED), self.live)
            ends = np.sort(np.append(known, self.last + 1))
            stretches = {anchor: int(ends[np.searchsorted(ends, anchor, "right")]) - anchor for anchor in self.live}
            anchor = max(stretches, key=stretches.__getitem__)
            if pace.rejections_in(stretches[anchor]) < REJECTIONS_TO_SPLIT:
                return
            self.live = sorted([*self.live, anchor + stretches[anchor] // 2])

    def record(
        self,
        kept: np.ndarray,
        proposed: np.ndarray,
        logprobs: np.ndarray | None,
        expected: np.ndarray | None = None,
        verified: np.ndarray | None = None,
        *,
        pace: Pace,
    ) -> None:
        """Take the blocks of the live chains, in their order, and move each chain to its next anchor.

        kept [A], proposed and logprobs [A, K], expected and verified [A]: accepted lengths, token ids, drafter
        log-probs, committed tokens on average where proposals are drawn, proposals in front of the cut where blocks are
        cut; what lies behind the live chains is padding.
        """
        count = len(self.live)
        if not count:
            return
        anchors = np.array(self.live)
        kept = kept[:count]
        self.accepted[anchors], self.proposed[anchors] = kept, proposed[:count]
        if logprobs is not None:
            self.logprobs[anchors] = logprobs[:count]
        if expected is not None:
            if self.expected is None:
                self.expected = np.full(self.length, np.nan)
            self.expected[anchors] = expected[:count]
        most = proposed.shape[1]
        if verified is not None:
            if self.verified is None:
                self.verified = np.zeros(self.length, dtype=np.int64)
            self.verified[anchors] = most = verified[:count]
        judged = np.minimum(most, self.length - 1 - anchors)
        pace.blocks += count
        pace.rejections += int((kept < judged).sum())
        pace.committed += int(np.minimum(kept + 1, self.length - 1 - anchors).sum())
        following = {int(a) for a in anchors + kept + 1}
        self.live = sorted(a for a in following if a <= self.last and self.accepted[a] == NOT_EVALUATED)

    def trace(self) -> Trace:
        """Read the trace off the evaluated anchors."""
        anchors, anchor = [], self.first
        while anchor <= self.last:
            anchors.append(anchor)
            anchor += int(self.accepted[anchor]) + 1
        visited = np.array(anchors, dtype=np.int64)
        evaluated = int((self.accepted != NOT_EVALUATED).sum())
        return Trace(
            self.length,
            visited,
            self.accepted[visited],
            self.proposed[visited],
            self.logprobs[visited],
            evaluated,
            None if self.expected is None else self.expected[visited],
            None if self.verified is None else self.verified[visited],
        )
