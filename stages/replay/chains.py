"""Parallel replay: chains of anchors that start at many positions of many trajectories and coalesce.

A block depends on its anchor alone, so chains from different starts meet: a rejection sends both to the same next
anchor. Every round evaluates one block of every live chain in one packed forward; a chain stops when it steps on an
anchor that another chain has evaluated. The trace is then read off by walking from the first anchor. Work stays close
to one block a verify step, while sequential rounds fall by the number of chains. `chains=1` is one chain a trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory, pad_tokens
from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.replay.sampled import TargetSampler, VerifiedBlocks, draft_sampled
from draftsmith.stages.replay.trace import Trace

# Blocks that a round should hold before more chains are worth their extra blocks: by then matrix products are at
# their full rate on a CPU, and a GPU's kernels are no longer paid for launching alone.
BLOCKS_PER_ROUND = 32
# Live rows are copied together once this share of the batch is left; the copies of all rounds add up to a few contexts.
COMPACT_AT = 0.75
NOT_EVALUATED = -1
# A chain from any position joins the trace after a rejection or two. Two chains share a stretch only if at least this
# many are expected in it, so the blocks evaluated in vain stay a small share.
REJECTIONS_TO_SPLIT = 16
BLOCKS_TO_JUDGE = 8  # blocks seen before the rate of rejections is believed


@torch.no_grad()
def replay_chains(
    drafter: Drafter,
    context: Context,
    trajectories: Sequence[Trajectory],
    block_size: int,
    head: Head,
    chains: int | None = None,
    *,
    text: TargetSampler | None = None,
    with_proposals: bool = True,
    blocks_per_round: int = BLOCKS_PER_ROUND,
) -> list[Trace]:
    """Return the traces of a batch of trajectories.

    context: of the same trajectories, padded to one length.
    chains: starts in each trajectory, spread evenly. None: one, and more while a round holds fewer than
    `blocks_per_round` blocks and the text ahead of a chain is long enough for two to meet.
    text: of the same trajectories, where proposals are sampled; left out, they are argmaxes.
    with_proposals: else those that are sampled are left zero: sampling them is dear.
    """
    device = head.weight.device
    K = block_size - 1
    tokens = committed_tokens(trajectories, K, device)
    boards = [ChainState(t, K, chains or 1) for t in trajectories]
    rate = RejectionRate()

    rows = list(range(len(boards)))  # the batch: row r of `context` and `tokens` is trajectory rows[r]
    while live := [r for r, row in enumerate(rows) if boards[row].live]:
        if len(live) <= COMPACT_AT * len(rows):
            keep = torch.tensor(live, device=device)
            longest = max(boards[rows[r]].length for r in live)
            context, tokens = drafter.select(context, keep, longest), tokens[keep]
            text = None if text is None else text.select(keep)
            rows = [rows[r] for r in live]
        if chains is None:
            for row in rows:
                boards[row].split(blocks_per_round // len(live), rate)
        A = max(len(boards[row].live) for row in rows)
        # rows with fewer live chains repeat an anchor; the copies are not read
        anchors = np.array([(boards[row].live + [boards[row].filler] * A)[:A] for row in rows])
        anchors_RA = torch.from_numpy(anchors).to(device)
        seen = drafter.select(context, slice(0, len(rows)), int(anchors.max()))  # a view: nobody looks behind it
        found = draft(drafter, seen, tokens, anchors_RA, block_size, head, text=text, with_proposals=with_proposals)
        accepted, proposed = found.accepted.cpu().numpy(), found.proposed.cpu().numpy()
        expected = None if found.expected is None else found.expected.cpu().numpy()
        for r, row in enumerate(rows):
            boards[row].record(accepted[r], proposed[r], None if expected is None else expected[r], rate=rate)
    return [board.trace() for board in boards]


@torch.no_grad()
def successors(
    drafter: Drafter,
    context: Context,
    trajectories: Sequence[Trajectory],
    anchors: torch.Tensor,
    block_size: int,
    head: Head,
    text: TargetSampler | None,
) -> torch.Tensor:
    """Return the anchors [R, A] that a verify step at each of `anchors` [R, A] leads to.

    context, text: of the same R trajectories; None: proposals are argmaxes. Behind an end it is the first anchor, which
    every drafter visits.
    """
    tokens = committed_tokens(trajectories, block_size - 1, anchors.device)
    first, last = (
        torch.tensor(ends, device=anchors.device)[:, None]
        for ends in zip(*((t.first_anchor, t.last_anchor) for t in trajectories), strict=True)
    )
    found = draft(drafter, context, tokens, anchors, block_size, head, text=text, with_proposals=False)
    following = anchors + found.accepted + 1
    return torch.where(following > last, first, following)


def committed_tokens(trajectories: Sequence[Trajectory], proposals: int, device: torch.device) -> torch.Tensor:
    """Token ids [R, T + proposals], -1 behind each end: no proposal equals it, so nothing is accepted past the end."""
    tokens = pad_tokens(trajectories, device, fill=-1)
    return torch.cat([tokens, tokens.new_full((len(trajectories), proposals), -1)], 1)


def draft(
    drafter: Drafter,
    context: Context,
    tokens: torch.Tensor,
    anchors: torch.Tensor,
    block_size: int,
    head: Head,
    *,
    text: TargetSampler | None = None,
    with_proposals: bool = True,
) -> VerifiedBlocks:
    """Draft a block behind every anchor [R, A] and verify it against the committed `tokens`.

    with_proposals: as in `draft_sampled`.
    """
    if text is not None:
        return draft_sampled(drafter, context, text, tokens, anchors, block_size, head, with_proposals=with_proposals)
    proposed = drafter.propose(context, tokens.gather(1, anchors).clamp(min=0), anchors, block_size, head)
    ahead = anchors[..., None] + torch.arange(1, block_size, device=anchors.device)
    truth = tokens.gather(1, ahead.flatten(1)).view_as(ahead)
    return VerifiedBlocks(proposed, (proposed == truth).long().cumprod(-1).sum(-1))


def start_anchors(trajectory: Trajectory, chains: int) -> list[int]:
    """The first anchor, and further starts spread evenly over the response."""
    first, last = trajectory.first_anchor, trajectory.last_anchor
    if last < first:
        return []
    return sorted({first + (last + 1 - first) * c // chains for c in range(chains)})


@dataclass
class RejectionRate:
    """How often the drafter is rejected in this batch, as far as it has been seen."""

    blocks: int = 0
    rejections: int = 0
    committed: int = 0

    def rejections_in(self, tokens: int) -> float:
        """Expected in a stretch of text. 0 while too little has been seen."""
        return tokens * self.rejections / self.committed if self.blocks >= BLOCKS_TO_JUDGE else 0.0


class ChainState:
    """The evaluated anchors of one trajectory, and its live chains: the anchors whose blocks are wanted next."""

    def __init__(self, trajectory: Trajectory, proposals: int, chains: int):
        self.length = len(trajectory.tokens)
        self.first, self.last = trajectory.first_anchor, trajectory.last_anchor
        self.live = start_anchors(trajectory, chains)
        self.accepted = np.full(self.length, NOT_EVALUATED, dtype=np.int64)
        self.proposed = np.zeros((self.length, proposals), dtype=np.int64)
        self.expected: np.ndarray | None = None  # where proposals are sampled

    @property
    def filler(self) -> int:
        """An anchor that may be evaluated once more, where a batch needs one."""
        return self.live[0] if self.live else min(self.first, self.length - 1)

    def split(self, wanted: int, rate: RejectionRate) -> None:
        """Start chains amid the longest stretches of unread text, until `wanted` are live or stretches are short."""
        while 0 < len(self.live) < wanted:
            known = np.append(np.flatnonzero(self.accepted != NOT_EVALUATED), self.live)
            ends = np.sort(np.append(known, self.last + 1))
            stretches = {anchor: int(ends[np.searchsorted(ends, anchor, "right")]) - anchor for anchor in self.live}
            anchor = max(stretches, key=stretches.__getitem__)
            if rate.rejections_in(stretches[anchor]) < REJECTIONS_TO_SPLIT:
                return
            self.live = sorted([*self.live, anchor + stretches[anchor] // 2])

    def record(
        self, accepted: np.ndarray, proposed: np.ndarray, expected: np.ndarray | None = None, *, rate: RejectionRate
    ) -> None:
        """Take the blocks of the live chains, in their order, and move each chain to its next anchor.

        accepted [A], proposed [A, K], expected [A]: proposals accepted, token ids, committed tokens on average where
        proposals are sampled; what follows the live chains is padding.
        """
        count = len(self.live)
        if not count:
            return
        anchors = np.array(self.live)
        accepted = accepted[:count]
        self.accepted[anchors], self.proposed[anchors] = accepted, proposed[:count]
        if expected is not None:
            if self.expected is None:
                self.expected = np.full(self.length, np.nan)
            self.expected[anchors] = expected[:count]
        judged = np.minimum(proposed.shape[1], self.length - 1 - anchors)
        rate.blocks += count
        rate.rejections += int((accepted < judged).sum())
        rate.committed += int(np.minimum(accepted + 1, self.length - 1 - anchors).sum())
        following = {int(a) for a in anchors + accepted + 1}
        self.live = sorted(a for a in following if a <= self.last and self.accepted[a] == NOT_EVALUATED)

    def trace(self) -> Trace:
        """Read the trace off the evaluated anchors."""
        anchors, anchor = [], self.first
        while anchor <= self.last:
            anchors.append(anchor)
            anchor += int(self.accepted[anchor]) + 1
        visited = np.array(anchors, dtype=np.int64)
        evaluated = int((self.accepted != NOT_EVALUATED).sum())
        expected = None if self.expected is None else self.expected[visited]
        return Trace(self.length, visited, self.accepted[visited], self.proposed[visited], evaluated, expected)
