"""The objectives of SFT and of on-policy distillation: from a batch and its anchors to one scalar.

SFT (DFlash, arXiv 2602.06036): cross-entropy on the trajectory at all offsets of blocks behind random anchors.
OPD (Draft-OPD, arXiv 2605.29343, section 3): the target's feedback on what verification reached and rejected.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

import torch

from stages.drafters.base import Drafter
from stages.drafters.head import Head
from stages.training import losses
from stages.training.batches import Batch
from stages.training.chunked import chunked_sum


@dataclass(frozen=True)
class Anchors:
    """Where blocks are trained: A anchors a row, rows with fewer padded with copies that have valid = False."""

    positions: torch.Tensor  # [B, A] absolute
    valid: torch.Tensor  # bool [B, A]

    @property
    def blocks(self) -> int:
        return int(self.valid.sum())


@dataclass(frozen=True)
class MinedSteps:
    """What mining knows of the anchors of a batch: the verify step at each (K = block_size-1)."""

    committed: torch.Tensor  # [B, A] tokens that the step committed: offsets 1 … committed are its response stream
    rejected_offset: torch.Tensor  # [B, A] 0 = nothing rejected
    proposed: torch.Tensor  # [B, A, K]
    target_logprobs: torch.Tensor  # [B, A, K] on the draft-induced prefix, NaN where not judged


@dataclass
class LossReport:
    """The loss of one step and what it was made of."""

    loss: torch.Tensor
    blocks: int  # trained blocks
    positions: int  # block positions with a loss
    figures: dict[str, float] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)  # drafter, head_and_loss


def _block_hidden(drafter: Drafter, batch: Batch, anchors: Anchors) -> torch.Tensor:
    """[B, A, K, H] for the batch's anchors."""
    context = drafter.encode(batch.features, batch.positions)
    return drafter.block_hidden(
        context, batch.tokens.gather(1, anchors.positions), anchors.positions, drafter.block_size
    )


def _labels(batch: Batch, anchors: Anchors, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Committed token at each offset [B, A, K], and whether the trajectory reaches that far."""
    offsets = torch.arange(1, K + 1, device=anchors.positions.device)
    at = anchors.positions[..., None] + offsets
    lengths = torch.tensor([len(t.tokens) for t in batch.trajectories], device=at.device)
    inside = (at < lengths[:, None, None]) & anchors.valid[..., None]
    at = at.clamp(max=batch.tokens.shape[1] - 1)
    return batch.tokens.gather(1, at.flatten(1)).view_as(at), inside


def sft_loss(
    drafter: Drafter, batch: Batch, anchors: Anchors, head: Head, *, gamma: float, positions_per_chunk: int
) -> LossReport:
    """Mean of cross-entropies weighted by exp(-(k-1)/γ) over all offsets inside the trajectory."""
    started = time.perf_counter()
    hidden = _block_hidden(drafter, batch, anchors)
    drafted = time.perf_counter()
    K = hidden.shape[2]
    labels, inside = _labels(batch, anchors, K)
    columns, present = head.to_columns(labels)
    inside &= present
    weights = losses.decay_weights(torch.arange(1, K + 1, device=hidden.device), gamma).expand(inside.shape)[inside]
    columns = columns[inside]
    correct = 0

    def value(h: torch.Tensor, part: slice) -> torch.Tensor:
        nonlocal correct
        logits = head.logits(h)
        correct += int((logits.argmax(-1) == columns[part]).sum())
        return (weights[part] * losses.cross_entropy(logits, columns[part])).sum()

    total = chunked_sum(hidden[inside], positions_per_chunk, value)
    positions = columns.numel()
    return LossReport(
        total / weights.sum().clamp(min=1e-9),
        anchors.blocks,
        positions,
        {"accuracy": correct / max(positions, 1)},
        {"drafter": drafted - started, "head_and_loss": time.perf_counter() - drafted},
    )


@dataclass(frozen=True)
class OpdObjective:
    """Which losses OPD uses.

    paper: Bernoulli forward KL on the response stream plus k3 reverse KL on the rejected stream.
    matched: the response stream only, in the form that fits the verification rule: full-vocabulary forward KL if the
    drafter will verify against sampled tokens, cross-entropy on the committed token if against the argmax.
    """

    loss: Literal["matched", "paper"]
    sampled: bool  # the verification rule that the drafter will serve under
    temperature: float = 1.0  # of that sampling
    delta: float = 0.8
    weight_accepted: float = 1.0
    weight_rejected: float = 1.0


def opd_loss(
    drafter: Drafter,
    batch: Batch,
    anchors: Anchors,
    mined: MinedSteps,
    head: Head,
    target_head: torch.Tensor,
    objective: OpdObjective,
    *,
    positions_per_chunk: int,
) -> LossReport:
    """λ_acc · mean(response stream) + λ_rej · weighted mean(rejected stream).

    target_head: [V, H], the target's own head, for its distribution at committed positions.
    """
    started = time.perf_counter()
    hidden = _block_hidden(drafter, batch, anchors)
    drafted = time.perf_counter()
    K = hidden.shape[2]
    offsets = torch.arange(1, K + 1, device=hidden.device)
    labels, inside = _labels(batch, anchors, K)
    label_columns, present = head.to_columns(labels)
    response = inside & present & (offsets <= mined.committed[..., None])
    columns = label_columns[response]

    # the target's hidden state that predicts offset k lies at position anchor + k - 1
    at = (anchors.positions[..., None] + offsets - 1).clamp(max=batch.tokens.shape[1] - 1)
    rows = torch.arange(at.shape[0], device=at.device)[:, None, None].expand_as(at)
    target_hidden = batch.hidden[rows[response], at[response]]  # [N, H]

    def committed_value(h: torch.Tensor, part: slice) -> torch.Tensor:
        logits = head.logits(h)
        if objective.loss == "matched" and not objective.sampled:
            return losses.cross_entropy(logits, columns[part]).sum()
        with torch.no_grad():
            target_logits = head.logits(target_hidden[part]) if objective.loss == "matched" else None
        if target_logits is not None:
            return losses.forward_kl(logits, target_logits / objective.temperature).sum()
        log_q = -losses.cross_entropy(logits, columns[part])
        return losses.bernoulli_forward_kl(log_q, response_log_p[part]).sum()

    if objective.loss == "paper":
        response_log_p = _token_logprobs(target_hidden, target_head, labels[response], positions_per_chunk)
    count = columns.numel()
    response_mean = chunked_sum(hidden[response], positions_per_chunk, committed_value) / max(count, 1)
    figures = {"loss_response": float(response_mean.detach())}
    loss, positions = objective.weight_accepted * response_mean, count

    if objective.loss == "paper":
        proposal_columns, known = head.to_columns(mined.proposed)
        rejected = (
            (offsets >= mined.rejected_offset[..., None])
            & (mined.rejected_offset[..., None] > 0)
            & mined.target_logprobs.isfinite()
            & anchors.valid[..., None]
            & known
        )
        log_p, taken = mined.target_logprobs[rejected], proposal_columns[rejected]
        weights = losses.power_weights(offsets, objective.delta).expand(rejected.shape)[rejected]

        def rejected_value(h: torch.Tensor, part: slice) -> torch.Tensor:
            log_q = -losses.cross_entropy(head.logits(h), taken[part])
            return (weights[part] * losses.k3_reverse_kl(log_q, log_p[part])).sum()

        total = chunked_sum(hidden[rejected], positions_per_chunk, rejected_value)
        rejected_mean = total / weights.sum().clamp(min=1e-9)
        figures["loss_rejected"] = float(rejected_mean.detach())
        loss = loss + objective.weight_rejected * rejected_mean
        positions = int((response | rejected).sum())
    return LossReport(
        loss,
        anchors.blocks,
        positions,
        figures,
        {"drafter": drafted - started, "head_and_loss": time.perf_counter() - drafted},
    )


@torch.no_grad()
def _token_logprobs(
    hidden: torch.Tensor, head_weight: torch.Tensor, tokens: torch.Tensor, positions_per_chunk: int
) -> torch.Tensor:
    """log p(token) under the full head: hidden [N, H], tokens [N] → [N]."""
    full = Head(head_weight)
    parts = [
        -losses.cross_entropy(full.logits(h), t)
        for h, t in zip(hidden.split(positions_per_chunk), tokens.split(positions_per_chunk), strict=True)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)
