"""Blocks that the drafter drafts with gradient in a training step: their anchors, labels and operations."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
