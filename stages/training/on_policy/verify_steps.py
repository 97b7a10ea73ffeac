"""Verify steps at the anchors of a batch: read from a table, or judged on the blocks that a step has just drafted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from draftsmith.stages.drafters.head import Head
from draftsmith.stages.replay.scoring import StepScores, score_traces
from draftsmith.stages.replay.trace import Trace, Trajectory, groups_by_length, pad_tokens
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.batches import Batch
from draftsmith.stages.training.blocks import Anchors, labels_of

TREE_TOKENS = 512  # proposals that the target scores in one forward, a trajectory


@dataclass(frozen=True)
class VerifySteps:
    """The verify step at each anchor of a batch (K = proposals of the trained block)."""

    accepted: torch.Tensor  # [B, A] proposals kept
    committed: torch.Tensor  # [B, A] tokens that the step committed: offsets 1 … committed are its response stream
    rejected_offset: torch.Tensor  # [B, A] 0 = nothing rejected
    proposed: torch.Tensor  # [B, A, K]
    target_logprobs: torch.Tensor  # [B, A, K] on the draft-induced prefix, NaN where not judged or not scored


@torch.no_grad()
def judge(
    hidden: torch.Tensor,
    batch: Batch,
    anchors: Anchors,
    head: Head,
    *,
    proposals: int,
    positions_per_chunk: int,
    proposed: torch.Tensor | None = None,
) -> VerifySteps:
    """The verify steps of blocks that were drafted already: no second pass of the drafter.

    hidden: [B, A, K, H] on the trajectories' own tokens, which decide what is accepted for any drafter: up to the first
    rejection its proposals are these tokens. proposals: how many of the K the serving block has; with fewer, the first
    ones of the trained block stand in for a smaller block's own, which differ where a block attends in both directions
    (replay drafts the smaller block itself). proposed: [B, A, K] of an autoregressive drafter, whose proposals behind a
    rejection depend on it; without them those are not its own.
    """
    B, A, K, _ = hidden.shape
    labels, inside = labels_of(batch, anchors, K)
    inside = inside & (torch.arange(1, K + 1, device=hidden.device) <= proposals)
    columns = torch.cat(
        [head.logits(part).argmax(-1) for part in hidden.detach().reshape(B * A * K, -1).split(positions_per_chunk)]
    )
    best = head.to_tokens(columns).view(B, A, K)
    accepted = ((best == labels) & inside).long().cumprod(-1).sum(-1)
    judged = inside.long().sum(-1)
    lengths = torch.tensor([len(t.tokens) for t in batch.trajectories], device=hidden.device)
    committed = torch.minimum(accepted + 1, lengths[:, None] - 1 - anchors.positions)
    rejected_offset = torch.where(accepted < judged, accepted + 1, 0)
    unscored = torch.full(best.shape, torch.nan, device=hidden.device)
    return VerifySteps(accepted, committed, rejected_offset, best if proposed is None else proposed, unscored)


def with_scores(
    steps: VerifySteps, target: Target, batch: Batch, anchors: Anchors, proposals: int, tokens_per_forward: int = 2048
) -> VerifySteps:
    """The same with the target's log-probs of the proposals, as `score` has them."""
    traces = []
    for row, trajectory in enumerate(batch.trajectories):
        proposed = steps.proposed[row, :, :proposals].cpu().numpy()
        traces.append(
            Trace(
                len(trajectory.tokens),
                anchors.positions[row].cpu().numpy(),
                steps.accepted[row].cpu().numpy(),
                proposed,
                np.full(proposed.shape, np.nan, dtype=np.float32),
                len(proposed),
            )
        )
    scores = score(target, batch.trajectories, traces, tokens_per_forward)
    logprobs = torch.full_like(steps.target_logprobs, torch.nan)
    logprobs[..., :proposals] = torch.from_numpy(np.stack([s.target_logprobs for s in scores])).to(logprobs.device)
    return replace(steps, target_logprobs=logprobs)


@torch.no_grad()
def score(
    target: Target, trajectories: Sequence[Trajectory], traces: Sequence[Trace], tokens_per_forward: int = 2048
) -> list[StepScores]:
    """What the target says of the proposals of some steps: for every group of trajectories of at most
    `tokens_per_forward` tokens (or one), a forward for the key/value cache and one over the rejected proposals."""
    scores: dict[int, StepScores] = {}
    for group in groups_by_length([len(t.tokens) for t in trajectories], tokens_per_forward):
        ids = pad_tokens([trajectories[i] for i in group], target.device)
        B, T = ids.shape
        room = max(TREE_TOKENS, traces[0].proposed.shape[1] + 1)
        cache = target.new_cache(B, T + room)
        with torch.autocast(target.device.type, enabled=False):  # the training loop's is for the drafter alone
            out = target.step(ids, torch.arange(T, device=ids.device).expand(B, -1), cache, slice(0, B))
            of_group = score_traces(target, cache, out.hidden, [traces[i] for i in group], top_k=1, tree_tokens=room)
        scores |= dict(zip(group, of_group, strict=True))
    return [scores[i] for i in range(len(trajectories))]
