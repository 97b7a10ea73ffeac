"""What SFT and OPD share, from anchors to a reported loss, and SFT's own loss.

SFT (DFlash, arXiv 2602.06036): cross-entropy on the trajectory at all offsets of blocks behind random anchors.
OPD's loss is in `stages/training/distillation.py`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import torch

from stages.drafters.base import Drafter
from stages.drafters.head import Head
from stages.training import losses
from stages.training.batches import Batch
from stages.training.chunked import chunked_values


@dataclass(frozen=True)
class Anchors:
    """Where blocks are trained: A anchors a row, rows with fewer padded with copies that have valid = False."""

    positions: torch.Tensor  # [B, A] absolute
    valid: torch.Tensor  # bool [B, A]

    @property
    def blocks(self) -> int:
        return int(self.valid.sum())


@dataclass
class LossReport:
    """The loss of one step and what it was made of."""

    loss: torch.Tensor
    blocks: int  # trained blocks
    positions: int  # block positions with a loss
    figures: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # mining, drafter, head_and_loss


def block_hidden(drafter: Drafter, batch: Batch, anchors: Anchors) -> torch.Tensor:
    """[B, A, K, H] for the batch's anchors."""
    context = drafter.encode(batch.features, batch.positions)
    return drafter.block_hidden(
        context, batch.tokens.gather(1, anchors.positions), anchors.positions, drafter.block_size
    )


def labels_of(batch: Batch, anchors: Anchors, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Committed token at each offset [B, A, K], and whether the trajectory reaches that far."""
    offsets = torch.arange(1, K + 1, device=anchors.positions.device)
    at = anchors.positions[..., None] + offsets
    lengths = torch.tensor([len(t.tokens) for t in batch.trajectories], device=at.device)
    inside = (at < lengths[:, None, None]) & anchors.valid[..., None]
    at = at.clamp(max=batch.tokens.shape[1] - 1)
    return batch.tokens.gather(1, at.flatten(1)).view_as(at), inside


def weighted_mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ w·v / Σ w over all positions of a batch, 0 without any."""
    return (weights * values).sum() / weights.sum().clamp(min=1e-9)


def sft_loss(
    drafter: Drafter, batch: Batch, anchors: Anchors, head: Head, *, gamma: float, positions_per_chunk: int
) -> LossReport:
    """Mean of cross-entropies weighted by exp(-(k-1)/γ) over all offsets inside the trajectory."""
    started = time.perf_counter()
    hidden = block_hidden(drafter, batch, anchors)
    drafted = time.perf_counter()
    K = hidden.shape[2]
    labels, inside = labels_of(batch, anchors, K)
    columns, present = head.to_columns(labels)
    inside &= present
    weights = losses.decay_weights(torch.arange(1, K + 1, device=hidden.device), gamma).expand(inside.shape)[inside]
    columns = columns[inside]
    correct = 0

    def values(h: torch.Tensor, part: slice) -> torch.Tensor:
        nonlocal correct
        logits = head.logits(h)
        correct += int((logits.argmax(-1) == columns[part]).sum())
        return losses.cross_entropy(logits, columns[part])

    terms = chunked_values(hidden[inside], positions_per_chunk, values)
    positions = columns.numel()
    return LossReport(
        weighted_mean(terms, weights),
        anchors.blocks,
        positions,
        {"accuracy": correct / max(positions, 1)},
        {"drafter": drafted - started, "head_and_loss": time.perf_counter() - drafted},
    )
