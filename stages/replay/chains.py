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

from stages.drafters.base import Context, Drafter
from stages.drafters.head import Head
from stages.replay.trace import Trace, Trajectory, pad_tokens

NOT_EVALUATED = -1


def start_anchors(trajectory: Trajectory, chains: int) -> list[int]:
    """The first anchor, and further starts spread evenly over the response."""
    first, last = trajectory.first_anchor, trajectory.last_anchor
    if last < first:
        return []
    return sorted({first + (last + 1 - first) * c // chains for c in range(chains)})


def replay_chains(
    drafter: Drafter,
    context: Context,
    trajectories: Sequence[Trajectory],
    block_size: int,
    head: Head,
    chains: int = 16,
    *,
    with_logprobs: bool = True,
) -> list[Trace]:
    """Traces of a batch of trajectories. context: of the same trajectories, padded to one length.

    Without log-probs, which are a pass over the logits, those of the traces are NaN.
    """
    device = head.weight.device
    B, K = len(trajectories), block_size - 1
    tokens = pad_tokens(trajectories, device, fill=-1)  # -1 never equals a proposal: nothing is accepted past the end
    T = tokens.shape[1]
    tokens = torch.cat([tokens, tokens.new_full((B, K), -1)], 1)
    accepted = np.full((B, T), NOT_EVALUATED, dtype=np.int64)
    proposed = np.zeros((B, T, K), dtype=np.int64)
    logprobs = np.full((B, T, K), np.nan, dtype=np.float32)
    offsets = torch.arange(1, block_size, device=device)

    live = [start_anchors(t, chains) for t in trajectories]
    while any(live):
        A = max(len(anchors) for anchors in live)
        # rows with fewer live chains repeat an anchor; the copies are not read
        padded = [
            anchors + [anchors[0] if anchors else t.first_anchor] * (A - len(anchors))
            for anchors, t in zip(live, trajectories, strict=True)
        ]
        anchors_BA = torch.tensor(padded, device=device)
        anchor_tokens = tokens.gather(1, anchors_BA).clamp(min=0)
        block = drafter.propose(context, anchor_tokens, anchors_BA, block_size, head, with_logprobs=with_logprobs)
        truth = tokens.gather(1, (anchors_BA[..., None] + offsets).flatten(1)).unflatten(1, (A, K))
        kept_BA = (block.tokens == truth).long().cumprod(-1).sum(-1).cpu().numpy()
        tokens_BAK = block.tokens.cpu().numpy()
        logprobs_BAK = block.logprobs.cpu().numpy() if block.logprobs is not None else None
        for b, anchors in enumerate(live):
            n = len(anchors)
            accepted[b, anchors] = kept_BA[b, :n]
            proposed[b, anchors] = tokens_BAK[b, :n]
            if logprobs_BAK is not None:
                logprobs[b, anchors] = logprobs_BAK[b, :n]
            following = {a + int(k) + 1 for a, k in zip(anchors, kept_BA[b, :n], strict=True)}
            last = trajectories[b].last_anchor
            live[b] = sorted(a for a in following if a <= last and accepted[b, a] == NOT_EVALUATED)
    return [_walk(trajectory, accepted[b], proposed[b], logprobs[b]) for b, trajectory in enumerate(trajectories)]


def _walk(trajectory: Trajectory, accepted: np.ndarray, proposed: np.ndarray, logprobs: np.ndarray) -> Trace:
    """Read the trace off the evaluated anchors."""
    anchors, anchor = [], trajectory.first_anchor
    while anchor <= trajectory.last_anchor:
        anchors.append(anchor)
        anchor += int(accepted[anchor]) + 1
    visited = np.array(anchors, dtype=np.int64)
    evaluated = int((accepted != NOT_EVALUATED).sum())
    return Trace(len(trajectory.tokens), visited, accepted[visited], proposed[visited], logprobs[visited], evaluated)
