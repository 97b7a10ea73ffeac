"""Blocks that the drafter drafts with gradient in a training step: their anchors, labels and operations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.spec import StepShape
from draftsmith.stages.replay.sampled import TargetSampler
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.training.batches import Batch


@dataclass(frozen=True)
class DraftingView:
    """A batch as the drafter sees it in one step."""

    batch: Batch
    context: Context  # of its trajectories, with gradient; empty for a source that does not read it
    # Holds every token of the batch, so the right token can always be proposed. A wrong token that a reduced head lacks
    # cannot be proposed, and its rejection goes unseen.
    head: Head
    sampler: TargetSampler | None = None  # None: proposals are argmaxes, not sampled


@dataclass(frozen=True)
class DraftedBlocks:
    """Blocks of K proposals that the drafter drafted after the anchors of a batch."""

    batch: Batch
    anchors: torch.Tensor  # [B, A] absolute positions
    hidden: torch.Tensor  # [B, A, K, H] on the trajectories' own tokens, with gradient
    # [B, A, K, H] on the drafter's own proposals, if they differ from `hidden` (autoregressive drafters)
    on_proposals: torch.Tensor | None = None


def encode_batch(drafter: Drafter, batch: Batch) -> Context:
    """Return the drafter's context of the batch's trajectories, with gradient."""
    return drafter.encode(batch.features, batch.tokens, batch.positions)


def draft_blocks(drafter: Drafter, context: Context, batch: Batch, anchors: torch.Tensor) -> DraftedBlocks:
    """Draft a block after every anchor of a batch, on the trajectories' own tokens."""
    tokens = tokens_at(batch, anchors, 0, drafter.block_size - 1)
    return DraftedBlocks(batch, anchors, drafter.block_hidden(context, tokens, anchors))


def hidden_on_proposals(
    drafter: Drafter, context: Context, blocks: DraftedBlocks, proposed: torch.Tensor
) -> torch.Tensor:
    """Return the hidden states [B, A, K, H] on the drafter's own proposals [B, A, K], the same as when it drafted."""
    before = torch.cat([tokens_at(blocks.batch, blocks.anchors, 0, 1), proposed[..., :-1]], -1)
    return drafter.block_hidden(context, before, blocks.anchors)


def block_labels(batch: Batch, anchors: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the committed token at each offset 1 … K [B, A, K], and whether the trajectory reaches that far."""
    at = anchors[..., None] + torch.arange(1, K + 1, device=anchors.device)
    lengths = to_device([len(t.tokens) for t in batch.trajectories], at.device)
    return tokens_at(batch, anchors, 1, K), at < lengths[:, None, None]


def tokens_at(batch: Batch, anchors: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Return the tokens [B, A, count] at offsets first, first + 1, …; after the padded row's end, its last token."""
    offsets = torch.arange(first, first + count, device=anchors.device)
    at = (anchors[..., None] + offsets).clamp(max=batch.tokens.shape[1] - 1)
    return batch.tokens.gather(1, at.flatten(1)).view_as(at)


def count_operations(
    drafter: Drafter, batch: Batch, anchors: torch.Tensor, positions: int, head: Head, *, prefixes: int = 1
) -> float:
    """Count the operations of a step that trains `positions` block positions, with softmaxes over `head`."""
    rows, width = batch.tokens.shape
    at = anchors.cpu().numpy()
    shape = StepShape(rows, width, at, positions, head.weight.shape[0], prefixes, drafter.adapter_rank)
    return drafter.operations(shape)


def position_anchors(
    trajectories: Sequence[Trajectory], per_sequence: int, phases: np.ndarray, device: torch.device
) -> torch.Tensor:
    """Return `per_sequence` evenly spaced positions of each answer as anchors [B, A], offset by its phase.

    phases: [B], in [0, 1).
    Positions are different if the answer is long enough. Raises DraftsmithError for an answer without a position that
    has a following token.
    """
    for t in trajectories:
        if t.last_anchor < t.first_anchor:
            raise DraftsmithError(f"trajectory {t.trajectory_id}: the answer has one token. Remove it.")
    positions = [
        systematic_sample(np.arange(t.first_anchor, t.last_anchor + 1), per_sequence, phase)
        for t, phase in zip(trajectories, phases, strict=True)
    ]
    return to_device(np.stack(positions), device)


def systematic_sample(candidates: np.ndarray, count: int, phase: float) -> np.ndarray:
    """Return `count` of the candidates [N], evenly spaced and in order, offset by `phase` in [0, 1).

    At a random phase each candidate is as probable as in independent sampling, but the blocks overlap little, and a
    step sees the whole answer. A candidate is taken twice only if there are fewer than `count`, so that all steps of a
    training have the same number of blocks whatever their anchors are.
    """
    indices = ((np.arange(count) + phase) * len(candidates) / count).astype(np.int64)
    return candidates[np.minimum(indices, len(candidates) - 1)]  # rounding may reach N
