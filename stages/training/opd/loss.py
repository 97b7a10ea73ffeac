"""OPD's loss: the target's feedback on what verification committed and rejected (Draft-OPD, arXiv 2605.29343, 3)."""

from __future__ import annotations

import time

import torch

from draftsmith.stages.target.sampling import GREEDY, SamplingParams
from draftsmith.stages.training import losses
from draftsmith.stages.training.batches import Batch
from draftsmith.stages.training.blocks import Anchors, LossReport, Share, Weighted, tokens_at
from draftsmith.stages.training.chunked_loss import chunked_values
from draftsmith.stages.training.lm_heads import Heads
from draftsmith.stages.training.loss_config import LossConfig
from draftsmith.stages.training.opd.verify_steps import VerifySteps
from draftsmith.stages.training.response_loss import position_weights, response_stream, response_weight
from draftsmith.stages.training.selector_loss import choice_logprobs


def opd_loss(
    hidden: torch.Tensor,
    batch: Batch,
    anchors: Anchors,
    steps: VerifySteps | None,
    heads: Heads,
    target_head: torch.Tensor,
    objective: LossConfig,
    *,
    sampling: SamplingParams = GREEDY,
    on_proposals: torch.Tensor | None = None,
    proposals: int | None = None,
    positions_per_chunk: int,
) -> LossReport:
    """λ_acc · weighted mean(response stream) + λ_rej · weighted mean(rejected stream).

    hidden: [B, A, K, H] of the blocks on the trajectories' tokens. sampling: that of tokens and proposals.
    steps: may be None unless `objective.reads_steps`. on_proposals: [B, A, K, H] on the drafter's own proposals,
    where that is not the same (autoregressive drafters). proposals: of a served block (left out: K). objective:
    resolved. target_head: [V, H]. The report's operations are left to who drafted the blocks.
    """
    started = time.perf_counter()
    assert objective.temperature is not None, "resolve the objective first"
    response = response_stream(
        hidden,
        batch,
        anchors,
        heads,
        target_head,
        objective.response,
        temperature=objective.temperature,
        sampling=sampling,
        committed=None if steps is None else steps.committed,
        proposals=proposals,
        positions_per_chunk=positions_per_chunk,
    )
    streams = [response.sums]
    trained = response.positions
    figures: dict[str, float] = {
        "loss_response": response.sums.share(),
        "accuracy": response.accuracy,
    }
    if steps is not None:
        figures["steps_changed_share"] = _changed(steps, response.correct, anchors)
    if objective.needs_scores:
        assert steps is not None, "a rejected stream needs verify steps"
        own = hidden if on_proposals is None else on_proposals
        sums, where = _rejected(own, batch, anchors, steps, heads, objective, positions_per_chunk)
        figures["loss_rejected"] = sums.share()
        streams.append(sums)
        trained = trained | where
    loss = torch.stack([stream.factor * stream.mean for stream in streams]).sum()
    seconds = {"head_and_loss": time.perf_counter() - started}
    return LossReport(loss, anchors.blocks, int(trained.sum()), figures, seconds, streams=tuple(streams))


def stream_weights(
    batch: Batch, anchors: Anchors, steps: VerifySteps, heads: Heads, objective: LossConfig
) -> tuple[float, float]:
    """The sums of the weights of both streams: known without a forward, as `reads_steps` says."""
    K = steps.proposed.shape[2]
    response = response_weight(batch, anchors, K, heads.drafter, objective.response, steps.committed)
    where, _ = _rejected_places(anchors, steps, heads)
    offsets = torch.arange(1, K + 1, device=where.device)
    weights = position_weights(objective.rejected.positions, offsets, where, torch.empty(0))
    return response, float(weights[where].sum())


def _rejected_places(anchors: Anchors, steps: VerifySteps, heads: Heads) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the rejected stream has positions, and the columns of the proposals in the head, each [B, A, K]."""
    offsets = torch.arange(1, steps.proposed.shape[2] + 1, device=steps.proposed.device)
    columns, known = heads.drafter.to_columns(steps.proposed)
    first = steps.rejected_offset[..., None]
    judged = steps.target_logprobs.isfinite() & anchors.valid[..., None]
    return (offsets >= first) & (first > 0) & judged & known, columns


def _rejected(
    hidden: torch.Tensor,
    batch: Batch,
    anchors: Anchors,
    steps: VerifySteps,
    heads: Heads,
    objective: LossConfig,
    positions_per_chunk: int,
) -> tuple[Weighted, torch.Tensor]:
    """The drafter's proposals from the first rejected one on, judged on their own prefix: sums, positions [B, A, K]."""
    offsets = torch.arange(1, hidden.shape[2] + 1, device=hidden.device)
    where, columns = _rejected_places(anchors, steps, heads)
    log_p, taken = steps.target_logprobs[where], columns[where]
    own = hidden[where.nonzero(as_tuple=True)]
    if heads.chooser is not None:
        before = torch.cat([tokens_at(batch, anchors, 0, 1), steps.proposed[..., :-1]], -1)[where]
        log_q = choice_logprobs(heads.chooser, own, before, taken, heads.drafter, positions_per_chunk)
    else:
        log_q = chunked_values(
            own,
            positions_per_chunk,
            lambda h, part: -losses.cross_entropy(heads.drafter.logits(h), taken[part]),
            trained_head=heads.trained,
        )
    terms = losses.k3_reverse_kl(log_q, log_p)
    weights = position_weights(objective.rejected.positions, offsets, where, log_p)
    return Weighted.of(terms, weights[where], objective.rejected.weight), where


def _changed(steps: VerifySteps, correct: torch.Tensor, anchors: Anchors) -> Share:
    """Share of the trained steps at which the drafter no longer keeps as many tokens as `steps` says.

    Known without work: offsets up to the first rejection are in the stream, and say whether it is still the first.
    """
    now = correct.long().cumprod(-1).sum(-1)  # at least: nothing is known beyond the stream
    different = torch.where(steps.rejected_offset > 0, now != steps.accepted, now < steps.accepted) & anchors.valid
    return Share(int(different.sum()), int(anchors.valid.sum()))
