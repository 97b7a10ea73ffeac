"""Parallel replay: chains of anchors that start at many positions of many trajectories and coalesce.

A block depends only on its anchor, so chains from different starts meet: a rejection sends both to the same next
anchor. Every round evaluates one block of every live chain in one packed forward; a chain stops at an anchor that
another chain has evaluated. The trace is then read off by walking from the first anchor. Work stays close to one block
per verify step, while sequential rounds fall by the number of chains. `chains=1` is one chain per trajectory.
`replay_sequentially` is the reference that this must equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory, pad_tokens
from draftsmith.stages.drafters.base import Context, Drafter, PreparedDrafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.replay.sampled import TargetSampler, VerifiedBlocks, draft_sampled
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.runtime.memory import to_device

# Blocks per round, by type of device, up to which more chains are worth their extra blocks. Then matrix products run at
# full rate on a CPU, and a GPU does more than launch kernels (256: not measured).
BLOCKS_PER_ROUND = {"cpu": 32, "cuda": 256}
# Live rows are compacted once this share of the batch is left; the copies of all rounds add up to a few contexts.
COMPACT_AT = 0.75
NOT_EVALUATED = -1
# A chain from any position joins the trace after a rejection or two. Two chains share a stretch only if at least this
# many rejections are expected in it, so that few blocks are wasted.
REJECTIONS_TO_SPLIT = 16
BLOCKS_TO_ESTIMATE = 8  # minimum number of blocks for an estimate of the rejection rate


@torch.no_grad()
def replay_chains(
    drafter: PreparedDrafter,
    context: Context,
    trajectories: Sequence[Trajectory],
    chains: int | None = None,
    *,
    sampler: TargetSampler | None = None,
    with_proposals: bool = True,
) -> list[Steps]:
    """Return the traces of a batch of trajectories.

    context: that of the same trajectories, padded to one length.
    chains: starts per trajectory, spread evenly. None: one, and more while a round holds fewer than
    `BLOCKS_PER_ROUND` blocks and the text ahead of a chain is long enough for two to meet.
    sampler: the sampler of their proposals; None: they are argmaxes.
    with_proposals: False leaves sampled proposals zero, because sampling them is expensive.
    """
    device = drafter.head.weight.device
    K = drafter.block_size - 1
    tokens = committed_tokens(trajectories, K, device)
    states = [ChainState(t, K, chains or 1) for t in trajectories]
    rate = RejectionRate()

    rows = list(range(len(states)))  # the batch: row r of `context` and `tokens` is trajectory rows[r]
    while live := [r for r, row in enumerate(rows) if states[row].live]:
        if len(live) <= COMPACT_AT * len(rows):
            keep = to_device(live, device)
            longest = max(states[rows[r]].length for r in live)
            context, tokens = drafter.drafter.select(context, keep, longest), tokens[keep]
            sampler = None if sampler is None else sampler.select(keep)
            rows = [rows[r] for r in live]
        if chains is None:
            for row in rows:
                states[row].split(BLOCKS_PER_ROUND[device.type] // len(live), rate)
        A = max(len(states[row].live) for row in rows)
        # rows with fewer live chains repeat an anchor; the copies are not read
        anchors = np.array([(states[row].live + [states[row].filler] * A)[:A] for row in rows])
        anchors_RA = to_device(anchors, device)
        # a view: no block reads at or after its anchor
        visible = drafter.drafter.select(context, slice(0, len(rows)), int(anchors.max()))
        blocks = draft(drafter, visible, tokens, anchors_RA, sampler, with_proposals=with_proposals)
        verified = torch.cat([blocks.accepted[..., None], blocks.proposed], -1).cpu().numpy()  # one copy
        accepted, proposed = verified[..., 0], verified[..., 1:]
        expected = None if blocks.expected is None else blocks.expected.cpu().numpy()
        for r, row in enumerate(rows):
            states[row].record(accepted[r], proposed[r], None if expected is None else expected[r], rate)
    return [state.trace() for state in states]


@torch.no_grad()
def with_confidence(
    drafter: PreparedDrafter, context: Context, trajectories: Sequence[Trajectory], traces: Sequence[Steps]
) -> list[Steps]:
    """Return the traces with the drafter's confidence in their proposals: one more pass of its layers, without a head.

    context: that of the same trajectories, padded to one length.
    """
    device = drafter.head.weight.device
    tokens = committed_tokens(trajectories, drafter.block_size - 1, device).clamp(min=0)
    offsets = torch.arange(drafter.block_size - 1, device=device)
    completed = []
    for row, trace in enumerate(traces):
        logits = np.zeros(trace.proposed.shape, dtype=np.float32)
        for start in range(0, len(logits), BLOCKS_PER_ROUND[device.type]):
            part = slice(start, start + BLOCKS_PER_ROUND[device.type])
            anchors = to_device(trace.anchors[part], device)[None]
            visible = drafter.drafter.select(context, slice(row, row + 1), int(trace.anchors[part].max()))
            before = tokens[row, anchors[..., None] + offsets]  # the answer's tokens, like accepted proposals
            hidden = drafter.drafter.block_hidden(visible, before, anchors)
            logits[part] = drafter.drafter.confidence(hidden)[0].cpu().numpy()
        completed.append(replace(trace, confidence=logits))
    return completed


@torch.no_grad()
def successors(
    drafter: PreparedDrafter,
    context: Context,
    trajectories: Sequence[Trajectory],
    anchors: torch.Tensor,
    sampler: TargetSampler | None,
) -> torch.Tensor:
    """Return the anchors [R, A] that a verify step at each of `anchors` [R, A] leads to.

    After the end of a trajectory this is the first anchor, which every drafter visits.
    context, sampler: those of the same R trajectories; sampler None: proposals are argmaxes.
    """
    tokens = committed_tokens(trajectories, drafter.block_size - 1, anchors.device)
    first, last = (
        to_device(ends, anchors.device)[:, None]
        for ends in zip(*((t.first_anchor, t.last_anchor) for t in trajectories), strict=True)
    )
    blocks = draft(drafter, context, tokens, anchors, sampler, with_proposals=False)
    following = anchors + blocks.accepted + 1
    return torch.where(following > last, first, following)


def committed_tokens(trajectories: Sequence[Trajectory], proposals: int, device: torch.device) -> torch.Tensor:
    """Return token ids [R, T + proposals], -1 after each end: no proposal equals it, so none is accepted there."""
    tokens = pad_tokens(trajectories, device, fill=-1)
    return torch.cat([tokens, tokens.new_full((len(trajectories), proposals), -1)], 1)


def draft(
    drafter: PreparedDrafter,
    context: Context,
    tokens: torch.Tensor,
    anchors: torch.Tensor,
    sampler: TargetSampler | None = None,
    *,
    with_proposals: bool = True,
) -> VerifiedBlocks:
    """Draft a block after every anchor and verify it against the committed tokens.

    tokens: [R, T + K] from `committed_tokens`; anchors: [R, A] positions.
    sampler, with_proposals: as in `replay_chains`.
    """
    if sampler is not None:
        return draft_sampled(drafter, context, sampler, tokens, anchors, with_proposals=with_proposals)
    proposed = drafter.propose(context, tokens.gather(1, anchors).clamp(min=0), anchors)
    ahead = anchors[..., None] + torch.arange(1, drafter.block_size, device=anchors.device)
    truth = tokens.gather(1, ahead.flatten(1)).view_as(ahead)
    return VerifiedBlocks(proposed, (proposed == truth).long().cumprod(-1).sum(-1))


@dataclass
class RejectionRate:
    """Counts the drafter's rejections in a batch."""

    blocks: int = 0
    rejections: int = 0
    committed: int = 0  # tokens

    def rejections_in(self, tokens: int) -> float:
        """Return the expected rejections in a stretch of text; 0 until enough blocks were counted."""
        return tokens * self.rejections / self.committed if self.blocks >= BLOCKS_TO_ESTIMATE else 0.0


class ChainState:
    """The evaluated anchors of one trajectory, and its live chains: the anchors whose blocks come next."""

    def __init__(self, trajectory: Trajectory, proposals: int, chains: int):
        self.length = len(trajectory.tokens)
        self.first, self.last = trajectory.first_anchor, trajectory.last_anchor
        answer = max(0, self.last + 1 - self.first)
        self.live = sorted({self.first + answer * c // chains for c in range(chains if answer else 0)})
        self.accepted = np.full(self.length, NOT_EVALUATED, dtype=np.int64)
        self.proposed = np.zeros((self.length, proposals), dtype=np.int64)
        self.expected: np.ndarray | None = None  # set if proposals are sampled

    @property
    def filler(self) -> int:
        """Return an anchor that may be evaluated again, to fill a batch."""
        return self.live[0] if self.live else min(self.first, self.length - 1)

    def split(self, wanted: int, rate: RejectionRate) -> None:
        """Start chains inside the longest stretches of unread text, until `wanted` are live or stretches are short."""
        while 0 < len(self.live) < wanted:
            known = np.append(np.flatnonzero(self.accepted != NOT_EVALUATED), self.live)
            ends = np.sort(np.append(known, self.last + 1))
            stretches = {anchor: int(ends[np.searchsorted(ends, anchor, "right")]) - anchor for anchor in self.live}
            anchor = max(stretches, key=stretches.__getitem__)
            if rate.rejections_in(stretches[anchor]) < REJECTIONS_TO_SPLIT:
                return
            self.live = sorted([*self.live, anchor + stretches[anchor] // 2])

    def record(
        self, accepted: np.ndarray, proposed: np.ndarray, expected: np.ndarray | None, rate: RejectionRate
    ) -> None:
        """Record the blocks of the live chains, in their order, and move each chain to its next anchor.

        accepted: [A] proposals accepted; proposed: [A, K] token ids; expected: [A] mean committed tokens, if
        proposals are sampled. Entries after the live chains are padding.
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
        verified = np.minimum(proposed.shape[1], self.length - 1 - anchors)
        rate.blocks += count
        rate.rejections += int((accepted < verified).sum())
        rate.committed += int(np.minimum(accepted + 1, self.length - 1 - anchors).sum())
        following = {int(a) for a in anchors + accepted + 1}
        self.live = sorted(a for a in following if a <= self.last and self.accepted[a] == NOT_EVALUATED)

    def trace(self) -> Steps:
        """Read the trace off the evaluated anchors."""
        anchors, anchor = [], self.first
        while anchor <= self.last:
            anchors.append(anchor)
            anchor += int(self.accepted[anchor]) + 1
        visited = np.array(anchors, dtype=np.int64)
        evaluated = int((self.accepted != NOT_EVALUATED).sum())
        expected = None if self.expected is None else self.expected[visited]
        return Steps(
            self.length,
            visited,
            self.accepted[visited],
            self.proposed[visited],
            expected=expected,
            evaluated_blocks=evaluated,
        )


def replay_sequentially(
    drafter: Drafter, context: Context, trajectory: Trajectory, block_size: int, head: Head
) -> Steps:
    """Return the trace of a drafter, one block after the other: the reference that parallel replay must equal.

    context: that of this trajectory alone (batch of one), over all its positions.
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
    return Steps(
        len(tokens),
        np.array(anchors, dtype=np.int64),
        np.array(accepted, dtype=np.int64),
        np.array(proposed, dtype=np.int64).reshape(len(anchors), block_size - 1),
        evaluated_blocks=len(anchors),
    )
