"""Parallel replay: chains of anchors that start at many positions of many trajectories and coalesce.

A block depends on its anchor alone, so chains from different starts meet: a rejection sends both to the same next
anchor. Every round evaluates one block of every live chain in one packed forward; a chain stops when it steps on an
anchor that another chain has evaluated. The trace is then read off by walking from the first anchor. Work stays close
to one block a verify step, while sequential rounds fall by the number of chains. `chains=1` is one chain a trajectory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.cutting import verified
from draftsmith.stages.drafters.head import Head
from draftsmith.stages.replay.board import Board, Pace
from draftsmith.stages.replay.drawn import Judged, SampledText, draft_drawn
from draftsmith.stages.replay.trace import Trace, Trajectory, pad_tokens

# Blocks that a round should hold before more chains are worth their extra blocks: by then matrix products are at
# their full rate on a CPU, and a GPU's kernels are no longer paid for launching alone.
BLOCKS_PER_ROUND = 32
# Live rows are copied together once this share of the batch is left; the copies of all rounds add up to a few contexts.
COMPACT_AT = 0.75


@torch.no_grad()
def replay_chains(
    drafter: Drafter,
    context: Context,
    trajectories: Sequence[Trajectory],
    block_size: int,
    head: Head,
    chains: int | None = None,
    *,
    text: SampledText | None = None,
    confidence: float | None = None,
    with_proposals: bool = True,
    with_logprobs: bool = True,
    blocks_per_round: int = BLOCKS_PER_ROUND,
) -> list[Trace]:
    """Traces of a batch of trajectories. context: of the same trajectories, padded to one length.

    text: of the same trajectories, where proposals are drawn; left out, they are argmaxes. confidence: blocks are cut
    by it, as `DraftingConfig` has it.

    chains: starts in each trajectory, spread evenly. None: one, and more while a round holds fewer than
    `blocks_per_round` blocks and the text ahead of a chain is long enough for two to meet.
    with_proposals: else those that are drawn are left zero: drawing them is dear. Without log-probs, which are a pass
    over the logits, those of the traces are NaN.
    """
    device = head.weight.device
    K = block_size - 1
    tokens = committed_tokens(trajectories, K, device)
    boards = [Board(t, K, chains or 1) for t in trajectories]
    pace = Pace()

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
                boards[row].split(blocks_per_round // len(live), pace)
        A = max(len(boards[row].live) for row in rows)
        # rows with fewer live chains repeat an anchor; the copies are not read
        anchors = np.array([(boards[row].live + [boards[row].filler] * A)[:A] for row in rows])
        anchors_RA = torch.from_numpy(anchors).to(device)
        seen = drafter.select(context, slice(0, len(rows)), int(anchors.max()))  # a view: nobody looks behind it
        found = draft(
            drafter,
            seen,
            tokens,
            anchors_RA,
            block_size,
            head,
            text=text,
            confidence=confidence,
            with_proposals=with_proposals,
            with_logprobs=with_logprobs,
        )
        kept, proposed = found.accepted.cpu().numpy(), found.proposals.tokens.cpu().numpy()
        others = [
            None if x is None else x.cpu().numpy() for x in (found.proposals.logprobs, found.expected, found.verified)
        ]
        for r, row in enumerate(rows):
            of_row = [None if x is None else x[r] for x in others]
            boards[row].record(kept[r], proposed[r], *of_row, pace=pace)
    return [board.trace() for board in boards]


@torch.no_grad()
def successors(
    drafter: Drafter,
    context: Context,
    trajectories: Sequence[Trajectory],
    anchors: torch.Tensor,
    block_size: int,
    head: Head,
    text: SampledText | None,
) -> torch.Tensor:
    """The anchors [R, A] that a verify step at each of `anchors` [R, A] leads to.

    context, text: of the same R trajectories; None: proposals are argmaxes. Behind an end it is the first anchor, which
    every drafter visits.
    """
    tokens = committed_tokens(trajectories, block_size - 1, anchors.device)
    first, last = (
        torch.tensor(ends, device=anchors.device)[:, None]
        for ends in zip(*((t.first_anchor, t.last_anchor) for t in trajectories), strict=True)
    )
    found = draft(
        drafter, context, tokens, anchors, block_size, head, text=text, with_proposals=False, with_logprobs=False
    )
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
    text: SampledText | None = None,
    confidence: float | None = None,
    with_proposals: bool = True,
    with_logprobs: bool,
) -> Judged:
    """A block behind every anchor [R, A], and how many of its proposals the committed `tokens` keep.

    confidence: what it is cut by. with_proposals: as in `draft_drawn`.
    """
    if text is not None:
        return draft_drawn(
            drafter,
            context,
            text,
            tokens,
            anchors,
            block_size,
            head,
            confidence=confidence,
            with_proposals=with_proposals,
            with_logprobs=with_logprobs,
        )
    block = drafter.propose(
        context, tokens.gather(1, anchors).clamp(min=0), anchors, block_size, head, with_logprobs=with_logprobs
    )
    ahead = anchors[..., None] + torch.arange(1, block_size, device=anchors.device)
    truth = tokens.gather(1, ahead.flatten(1)).view_as(ahead)
    accepted = (block.tokens == truth).long().cumprod(-1).sum(-1)
    if confidence is None:
        return Judged(block, accepted)
    assert block.confidence is not None
    most = verified(block.confidence, confidence)
    return Judged(block, torch.minimum(accepted, most), verified=most)
