"""OPD's loss: the target's feedback on what verification committed and rejected (Draft-OPD, arXiv 2605.29343, 3)."""

from __future__ import annotations

import time

import torch

from draftsmith.stages.training import losses
from draftsmith.stages.training.batches import Batch
from draftsmith.stages.training.blocks import (
    Anchors,
    DraftedBlocks,
    LossContext,
    LossReport,
    Ratio,
    SoftmaxHeads,
    WeightedMean,
    tokens_at,
)
from draftsmith.stages.training.chunked_loss import chunked_values
from draftsmith.stages.training.loss_config import LossConfig
from draftsmith.stages.training.opd.verify_steps import VerifySteps
from draftsmith.stages.training.response_loss import position_weights, response_loss, response_weight, selector_logprobs


def opd_loss(
    blocks: DraftedBlocks,
    context: LossContext,
    objective: LossConfig,
    steps: VerifySteps | None,
    proposals: int | None = None,
) -> LossReport:
    """Compute λ_acc · weighted mean(response stream) + λ_rej · weighted mean(rejected stream).

    objective: resolved. steps: may be None unless `objective.reads_steps`. proposals: of a served block; left out: K.
    The caller adds the report's operations: it drafted the blocks.
    """
    started = time.perf_counter()
    assert objective.temperature is not None, "resolve the objective first"
    committed = None if steps is None else steps.committed
    response = response_loss(blocks, context, objective.response, objective.temperature, committed, proposals)
    streams = [response.sums]
    trained = response.positions
    metrics: dict[str, float] = {
        "loss_response": response.sums.ratio(),
        "accuracy": response.accuracy,
    }
    if steps is not None:
        metrics["steps_changed_share"] = _changed_ratio(steps, response.correct, blocks.anchors)
    if objective.needs_scores:
        assert steps is not None, "a rejected stream needs verify steps"
        sums, mask = _rejected_stream(blocks, context, objective, steps)
        metrics["loss_rejected"] = sums.ratio()
        streams.append(sums)
        trained = trained | mask
    loss = torch.stack([stream.factor * stream.mean for stream in streams]).sum()
    seconds = {"head_and_loss": time.perf_counter() - started}
    return LossReport(loss, blocks.anchors.blocks, int(trained.sum()), metrics, seconds, streams=tuple(streams))


def stream_weights(
    batch: Batch, anchors: Anchors, steps: VerifySteps, heads: SoftmaxHeads, objective: LossConfig
) -> tuple[float, float]:
    """Sum the weights of both streams, which are known without a forward if the objective has a rejected stream."""
    K = steps.proposed.shape[2]
    response = response_weight(batch, anchors, K, heads.drafter, objective.response, steps.committed)
    mask, _ = _rejected_positions(anchors, steps, heads)
    offsets = torch.arange(1, K + 1, device=mask.device)
    weights = position_weights(objective.rejected.positions, offsets, mask, torch.empty(0))
    return response, float(weights[mask].sum())


def _rejected_positions(anchors: Anchors, steps: VerifySteps, heads: SoftmaxHeads) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mask of the rejected stream's positions, and the proposals' columns in the head, each [B, A, K]."""
    offsets = torch.arange(1, steps.proposed.shape[2] + 1, device=steps.proposed.device)
    columns, present = heads.drafter.to_columns(steps.proposed)
    first = steps.rejected_offset[..., None]
    scored = steps.target_logprobs.isfinite() & anchors.valid[..., None]
    return (offsets >= first) & (first > 0) & scored & present, columns


def _rejected_stream(
    blocks: DraftedBlocks, context: LossContext, objective: LossConfig, steps: VerifySteps
) -> tuple[WeightedMean, torch.Tensor]:
    """Compute the loss of the drafter's proposals from the first rejected one on, each after its own prefix.

    Returns the stream's sums and the mask [B, A, K] of its positions.
    """
    heads = context.heads
    hidden = blocks.hidden if blocks.on_proposals is None else blocks.on_proposals
    offsets = torch.arange(1, hidden.shape[2] + 1, device=hidden.device)
    mask, all_columns = _rejected_positions(blocks.anchors, steps, heads)
    indices = mask.nonzero(as_tuple=True)
    log_p, columns, rejected = steps.target_logprobs[indices], all_columns[indices], hidden[indices]
    if heads.selector is not None:
        anchor_tokens = tokens_at(blocks.batch, blocks.anchors, 0, 1)
        previous = torch.cat([anchor_tokens, steps.proposed[..., :-1]], -1)[indices]
        log_q = selector_logprobs(rejected, previous, columns, context)
    else:
        log_q = chunked_values(
            rejected,
            context.positions_per_chunk,
            lambda h, chunk: -losses.cross_entropy(heads.drafter.logits(h), columns[chunk]),
            trained_head=heads.trained,
        )
    terms = losses.k3_reverse_kl(log_q, log_p)
    weights = position_weights(objective.rejected.positions, offsets, mask, log_p)
    return WeightedMean.from_values(terms, weights[indices], objective.rejected.weight), mask


def _changed_ratio(steps: VerifySteps, correct: torch.Tensor, anchors: Anchors) -> Ratio:
    """Return the share of the trained steps that would no longer accept as many proposals as `steps` has.

    It costs nothing: offsets up to the first rejection are in the stream, which shows whether it is still the first.
    correct: bool [B, A, K], as in `StreamLoss`.
    """
    now = correct.long().cumprod(-1).sum(-1)  # a lower bound: nothing is known of offsets outside the stream
    different = torch.where(steps.rejected_offset > 0, now != steps.accepted, now < steps.accepted) & anchors.valid
    return Ratio(int(different.sum()), int(anchors.valid.sum()))
