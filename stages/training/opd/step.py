"""One step of OPD: sample anchors, draft their blocks with gradient, find their verify steps, compute the loss.

The loss is the target's feedback on committed and rejected tokens (Draft-OPD, arXiv 2605.29343, section 3).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from draftsmith.stages.drafters.base import Context, Drafter, PreparedDrafter
from draftsmith.stages.replay.chains import committed_tokens, draft
from draftsmith.stages.replay.sampled import TargetSampler
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.runtime.ranks import Ranks
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from draftsmith.stages.training import losses
from draftsmith.stages.training.batches import Batch, RankSlice
from draftsmith.stages.training.config import TrainingConfig
from draftsmith.stages.training.drafted_blocks import (
    DraftedBlocks,
    DraftingView,
    count_operations,
    draft_blocks,
    encode_batch,
    hidden_on_proposals,
    tokens_at,
)
from draftsmith.stages.training.loss_registry import LossConfig, RejectedStream
from draftsmith.stages.training.loss_report import LossReport, Ratio, WeightedMean
from draftsmith.stages.training.opd.anchor_sources import AnchorSource
from draftsmith.stages.training.opd.verify_steps import StepAnchors, score_steps, verify_blocks
from draftsmith.stages.training.response_loss import (
    StreamLoss,
    offset_weights,
    response_loss,
    response_weight,
    selector_logprobs,
)
from draftsmith.stages.training.softmax_heads import HeadSource, LossContext, SoftmaxHeads


@dataclass(frozen=True)
class StepOptions:
    """Settings that all steps of a training share."""

    config: TrainingConfig
    objective: LossConfig  # resolved
    proposals: int  # length of a served block, at most that of the trained one
    sampling: SamplingParams = GREEDY  # that of the answers if the drafter samples its proposals


@dataclass
class _MicroBatch:
    """Rows of a step, with their anchors, before the loss."""

    batch: Batch
    anchors: StepAnchors  # of the first round
    shifts: np.ndarray  # [B, source.numbers] random numbers
    sampler: TargetSampler | None  # if proposals are sampled
    context: Context | None  # with gradient; None: encoded again before the loss


class OpdStep:
    """Computes the losses of all steps, with anchors from one source and one objective."""

    def __init__(self, drafter: Drafter, target: Target, source: AnchorSource, options: StepOptions):
        self.drafter, self.target, self.source, self.options = drafter, target, source, options
        self.objective, self.sampling = options.objective, options.sampling
        self.heads = HeadSource(drafter, target.head_weight, options.config)

    def micro_batches(self, step: int, rank_slice: RankSlice, rng: np.random.Generator) -> Iterator[LossReport]:
        """Yield the losses of a step's micro-batches.

        All anchors are sampled first, under the weights that the loss sees, so that micro-batches share one head and
        one divisor for each stream.
        """
        clock, ranks, single = _Clock(), rank_slice.ranks, rank_slice.is_one_batch
        heads = self.heads.sample(rng, [rank_slice.step_tokens])
        shifts = rng.random((rank_slice.step_rows, self.source.numbers))[rank_slice.rows]
        clock.spent("head_and_loss")
        micro_batches = [
            self._sample_anchors(step, rank_slice, rows, shifts[rows], heads, clock)
            for rows in rank_slice.micro_batches
        ]
        self.source.share(ranks)
        step_weights = None
        if self.objective.needs_scores:
            self._score(micro_batches, rank_slice)
            if not single:
                heads = self._with_rejected(rng, micro_batches, rank_slice)
                step_weights = self._step_weights(micro_batches, heads, ranks)
        clock.spent("mining")
        for micro_batch in micro_batches:
            clock.resume()
            report = self._train(micro_batch, heads, rng if single else None, clock)
            report.is_full_step, report.step_weights = single, step_weights
            report.seconds = clock.take()
            yield report

    def _sample_anchors(
        self,
        step: int,
        rank_slice: RankSlice,
        rows: slice,
        shifts: np.ndarray,
        heads: SoftmaxHeads,
        clock: _Clock,
    ) -> _MicroBatch:
        """Sample the anchors of some rows. Find their verify steps if all micro-batches need them before the loss.

        shifts: [rows, source.numbers].
        """
        single, batch = rank_slice.is_one_batch, rank_slice.batch.select(rows)
        reads_context = single or self.source.reads_context or self.objective.needs_scores
        with torch.set_grad_enabled(single and torch.is_grad_enabled()):
            context = encode_batch(self.drafter, batch) if reads_context else Context()
            clock.spent("drafter")
            sampler = self._sampler(batch, step)
            view = DraftingView(batch, context, heads.drafter, sampler)
            anchors = self.source.sample(step, rank_slice.indices[rows], view, shifts)
            clock.spent("mining")
            if not single and anchors.steps is None and self.objective.needs_scores:
                blocks = draft_blocks(self.drafter, context, batch, anchors.anchors)
                anchors = self._verified(anchors, blocks, context, heads, sampler)
                clock.spent("drafter")
        return _MicroBatch(batch, anchors, shifts, sampler, context if single else None)

    def _score(self, micro_batches: Sequence[_MicroBatch], rank_slice: RankSlice) -> None:
        """Score the known steps that the target has not scored yet.

        A single batch whose blocks are verified while they are trained has no such steps.
        """
        if any(micro_batch.anchors.steps is None for micro_batch in micro_batches):
            return
        sampled = [(micro_batch.batch.trajectories, micro_batch.anchors) for micro_batch in micro_batches]
        tokens = self.options.config.tokens_per_target_forward
        kept, ranks = rank_slice.batch.kept, rank_slice.ranks
        offsets = self.objective.rejected.offsets
        scored = score_steps(sampled, self.target, self.options.proposals, tokens, kept, ranks, offsets=offsets)
        for micro_batch, anchors in zip(micro_batches, scored, strict=True):
            micro_batch.anchors = anchors

    def _with_rejected(
        self, rng: np.random.Generator, micro_batches: Sequence[_MicroBatch], rank_slice: RankSlice
    ) -> SoftmaxHeads:
        """Return heads that also hold the proposals of every rank's verify steps."""
        needed = [rank_slice.step_tokens]
        if self.heads.is_reduced:
            proposed = torch.cat(
                [micro_batch.anchors.known_steps.proposed.unique() for micro_batch in micro_batches]
            ).cpu()
            needed += [ids.to(needed[0].device) for ids in rank_slice.ranks.gather(proposed)]
        return self.heads.sample(rng, needed)

    def _step_weights(
        self, micro_batches: Sequence[_MicroBatch], heads: SoftmaxHeads, ranks: Ranks
    ) -> tuple[float, ...]:
        """Return the summed weights of each stream over the full step."""
        batch_weights = [
            stream_weights(micro_batch.batch, micro_batch.anchors.known_steps, heads, self.objective)
            for micro_batch in micro_batches
        ]
        rank_weights = ranks.gather([sum(weights) for weights in zip(*batch_weights, strict=True)])
        totals = [sum(weights) for weights in zip(*rank_weights, strict=True)]
        return (sum(totals),) * 2 if self.objective.pooled else tuple(totals)

    def _train(
        self, micro_batch: _MicroBatch, heads: SoftmaxHeads, rng: np.random.Generator | None, clock: _Clock
    ) -> LossReport:
        """Draft the blocks of a micro-batch in the source's rounds, and return their loss.

        All rounds share one graph: the context is encoded once, and its gradient is computed once.
        rng: samples the head, if it holds rejected tokens that only this method finds.
        """
        batch, anchors, config = micro_batch.batch, micro_batch.anchors, self.options.config
        context = encode_batch(self.drafter, batch) if micro_batch.context is None else micro_batch.context
        drafted, responses = [anchors.anchors], list[StreamLoss]()
        while True:
            blocks = draft_blocks(self.drafter, context, batch, drafted[-1])
            clock.spent("drafter")
            if anchors.steps is None and self._needs_steps:
                anchors = self._verified(anchors, blocks, context, heads, micro_batch.sampler)
                clock.spent("drafter")
                if self.objective.needs_scores:
                    sampled, tokens = [(batch.trajectories, anchors)], config.tokens_per_target_forward
                    proposals, offsets = self.options.proposals, self.objective.rejected.offsets
                    (anchors,) = score_steps(sampled, self.target, proposals, tokens, batch.kept, offsets=offsets)
                    clock.spent("mining")
            steps = anchors.steps
            if self.drafter.autoregressive and self.objective.needs_scores:
                assert steps is not None
                on_proposals = hidden_on_proposals(self.drafter, context, blocks, steps.proposed)
                blocks = replace(blocks, on_proposals=on_proposals)
            clock.spent("drafter")
            if rng is not None and self.objective.needs_scores and steps is not None:
                heads = self.heads.sample(rng, [batch.tokens, steps.proposed])
            loss_context = LossContext(heads, self.target.head_weight, config.positions_per_chunk, self.sampling)
            responses.append(opd_response(blocks, loss_context, self.objective, steps, self.options.proposals))
            clock.spent("head_and_loss")
            if len(drafted) == self.source.rounds:
                break
            committed, shifts = responses[-1].committed, micro_batch.shifts
            drafted.append(self.source.following(batch.trajectories, drafted, committed, shifts))
            anchors = StepAnchors(drafted[-1])
        response = StreamLoss.joined(responses)
        report = opd_loss(response, blocks, loss_context, self.objective, steps)
        everywhere = torch.cat(drafted, 1)
        report.operations = count_operations(self.drafter, batch, everywhere, report.positions, heads.drafter)
        if blocks.on_proposals is not None:  # chains were drafted twice; the head read them once
            report.operations += count_operations(self.drafter, batch, everywhere, 0, heads.drafter, prefixes=0)
        if anchors.mined and self.sampling.greedy:  # other steps are fresh, absent or sampled
            assert steps is not None
            report.metrics["steps_changed_share"] = changed_ratio(steps, response.correct)
        report.metrics |= anchors.metrics
        clock.spent("head_and_loss")
        return report

    @property
    def _needs_steps(self) -> bool:
        """Return whether the loss needs verify steps as input. For argmax proposals it computes them itself."""
        if self.sampling.greedy:
            return self.objective.reads_steps
        return self.objective.reads_committed or self.source.rounds > 1

    def _verified(
        self,
        anchors: StepAnchors,
        blocks: DraftedBlocks,
        context: Context,
        heads: SoftmaxHeads,
        sampler: TargetSampler | None,
    ) -> StepAnchors:
        """Return the anchors with the verify steps of their blocks; the target has not scored them."""
        proposed = None
        if (self.drafter.autoregressive or sampler is not None) and self.objective.needs_scores:  # own tokens
            batch, size = blocks.batch, self.drafter.block_size
            tokens = committed_tokens(batch.trajectories, size - 1, batch.tokens.device)
            drafter = PreparedDrafter(self.drafter, heads.drafter, size)
            proposed = draft(drafter, context, tokens, blocks.anchors, sampler).proposed
        steps = verify_blocks(blocks, heads, proposals=self.options.proposals, proposed=proposed, sampler=sampler)
        return replace(anchors, steps=steps, unscored=range(len(blocks.batch.trajectories)))

    def _sampler(self, batch: Batch, step: int) -> TargetSampler | None:
        """Return the sampler that accepts sampled proposals, with new random numbers in every step; None: argmaxes."""
        if self.sampling.greedy:
            return None
        assert batch.hidden is not None
        proposals = self.drafter.block_size - 1
        return TargetSampler.for_trajectories(
            self.target, batch.hidden, batch.trajectories, self.sampling, proposals, salt=step + 1
        )


class _Clock:
    """Measures the seconds of each phase."""

    def __init__(self) -> None:
        self._since, self._seconds = time.perf_counter(), dict.fromkeys(("mining", "drafter", "head_and_loss"), 0.0)

    def spent(self, phase: str) -> None:
        """Add the time since the last call to a phase."""
        now = time.perf_counter()
        self._seconds[phase] += now - self._since
        self._since = now

    def resume(self) -> None:
        """Skip the time since the last call, in which the caller computed a micro-batch's gradient."""
        self._since = time.perf_counter()

    def take(self) -> dict[str, float]:
        """Return the seconds by phase since the last call of `take`."""
        taken, self._seconds = self._seconds, dict.fromkeys(self._seconds, 0.0)
        return taken


def opd_response(
    blocks: DraftedBlocks,
    context: LossContext,
    objective: LossConfig,
    steps: Steps[torch.Tensor] | None,
    proposals: int | None = None,
) -> StreamLoss:
    """Compute the loss of the response stream.

    objective: resolved. steps: required if `objective.reads_steps`. proposals: length of a served block; None: K.
    """
    assert objective.temperature is not None, "resolve the objective first"
    committed = None if steps is None else steps.committed
    return response_loss(blocks, context, objective.response, objective.temperature, committed, proposals)


def opd_loss(
    response: StreamLoss,
    blocks: DraftedBlocks,
    context: LossContext,
    objective: LossConfig,
    steps: Steps[torch.Tensor] | None,
) -> LossReport:
    """Compute λ_acc · weighted mean(response stream) + λ_rej · weighted mean(rejected stream).

    `objective.pooled` divides both weighted sums by the sum of all weights.
    response: result of `opd_response`. objective: resolved. blocks, steps: all blocks of the response and their steps;
    only the rejected stream reads them. The caller, which drafted the blocks, adds the report's operations and seconds.
    """
    streams = [response.sums]
    trained = response.positions
    metrics: dict[str, float] = {
        "loss_response": response.sums.ratio(),
        "accuracy": response.accuracy,
    }
    if objective.needs_scores:
        assert steps is not None, "a rejected stream needs verify steps"
        sums, mask = _rejected_stream(blocks, context, objective, steps)
        metrics["loss_rejected"] = sums.ratio()
        streams.append(sums)
        trained = trained | mask
    if objective.pooled:
        weight = torch.stack([stream.weight for stream in streams]).sum()
        streams = [replace(stream, weight=weight) for stream in streams]
    loss = torch.stack([stream.factor * stream.mean for stream in streams]).sum()
    return LossReport(loss, response.committed.numel(), int(trained.sum()), metrics, streams=tuple(streams))


def stream_weights(
    batch: Batch, steps: Steps[torch.Tensor], heads: SoftmaxHeads, objective: LossConfig
) -> tuple[float, float]:
    """Return the summed weights of each stream. With a rejected stream they are known without a forward."""
    K = steps.proposed.shape[2]
    response = response_weight(batch, steps.anchors, K, heads.drafter, objective.response, steps.committed)
    mask, _ = _rejected_positions(steps, heads, objective.rejected)
    return response, float(offset_weights(objective.rejected.positions, mask)[mask].sum())


def _rejected_positions(
    steps: Steps[torch.Tensor], heads: SoftmaxHeads, stream: RejectedStream
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the mask of the rejected stream's positions, and the proposals' columns in the head, each [B, A, K]."""
    offsets = torch.arange(1, steps.proposed.shape[2] + 1, device=steps.proposed.device)
    columns, present = heads.drafter.to_columns(steps.proposed)
    first = steps.rejected_offset[..., None]
    scored = steps.logprobs.isfinite()
    end = first + (steps.proposed.shape[2] if stream.offsets is None else stream.offsets)
    return (offsets >= first) & (offsets < end) & (first > 0) & scored & present, columns


def _rejected_stream(
    blocks: DraftedBlocks, context: LossContext, objective: LossConfig, steps: Steps[torch.Tensor]
) -> tuple[WeightedMean, torch.Tensor]:
    """Compute the loss of the proposals from the first rejected one on. Each follows the drafter's own prefix.

    Returns the stream's sums and the mask [B, A, K] of its positions.
    """
    heads = context.heads
    hidden = blocks.hidden if blocks.on_proposals is None else blocks.on_proposals
    mask, all_columns = _rejected_positions(steps, heads, objective.rejected)
    indices = mask.nonzero(as_tuple=True)
    log_p, columns, rejected = steps.logprobs[indices], all_columns[indices], hidden[indices]
    if heads.selector is not None:
        anchor_tokens = tokens_at(blocks.batch, blocks.anchors, 0, 1)
        previous = torch.cat([anchor_tokens, steps.proposed[..., :-1]], -1)[indices]
        log_q = selector_logprobs(rejected, previous, columns, context)
    else:
        log_q = losses.chunked_values(
            rejected,
            context.positions_per_chunk,
            lambda h, chunk: -losses.cross_entropy(heads.drafter.logits(h), columns[chunk]),
            trained_head=heads.trained,
        )
    terms = losses.k3_reverse_kl(log_q, log_p)
    weights = offset_weights(objective.rejected.positions, mask)
    return WeightedMean.from_values(terms, weights[indices], objective.rejected.weight), mask


def changed_ratio(steps: Steps[torch.Tensor], correct: torch.Tensor) -> Ratio:
    """Return the share of trained steps that now accept a different number of proposals than in `steps`.

    It needs no forward: the stream has all offsets up to the first rejection.
    correct: bool [B, A, K], as in `StreamLoss`.
    """
    now = correct.long().cumprod(-1).sum(-1)  # a lower bound: offsets outside the stream are unknown
    different = torch.where(steps.rejected_offset > 0, now != steps.accepted, now < steps.accepted)
    return Ratio(int(different.sum()), different.numel())
