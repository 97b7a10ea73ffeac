"""SFT: all offsets of blocks after anchors anywhere, with the loss that the architecture's authors use.

DFlash (arXiv 2602.06036): cross-entropy on the committed token, weight exp(-(k-1)/γ) at offset k. EAGLE-3
(arXiv 2503.01840): training-time test on the target's distribution over the draft vocabulary, weight 0.8 per step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, stored_splits
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import (
    create_drafter,
    drafter_source,
    has_native_head,
    kind_after,
    lineage_from,
    load_drafter,
    upgrade_drafter,
)
from draftsmith.stages.drafters.registry import KINDS
from draftsmith.stages.runtime.ranks import Ranks
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY
from draftsmith.stages.training.anchors import position_anchors
from draftsmith.stages.training.batches import Batch, frequent_tokens, step_rng, token_counts
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.drafted_blocks import count_operations, draft_blocks, encode_batch
from draftsmith.stages.training.loss_registry import ResponseStream
from draftsmith.stages.training.loss_report import LossReport
from draftsmith.stages.training.response_loss import response_loss
from draftsmith.stages.training.softmax_heads import HeadSource, LossContext
from draftsmith.stages.training.trainer import Trainer, TrainingData, load_answers


def run(ctx: StageContext, config: SftConfig) -> None:
    """Train, then write the checkpoint in the layout that engines load. Without steps the drafter does not change."""
    ranks = Ranks.current(config.parallel.target_parallel)
    start = _start(ctx, config)
    stored = load_answers(ctx, ranks)
    target = Target.load(ctx.inputs["target"], ranks=ranks)
    counts = token_counts(stored.trajectories, target.info.vocab_size)
    if start is not None:
        drafter = load_drafter(start, target, torch.float32, any_target=config.adopt)
        config.check_lora(drafter.kind, kind_after(drafter.kind, config.drafter))
        drafter = upgrade_drafter(drafter, config.drafter, target, ctx.seed)
    else:
        config.check_lora(None, config.drafter.kind)
        drafter = create_drafter(config.drafter, target, ctx.seed, frequent_tokens(counts))
        if KINDS[drafter.kind].native:
            assert target.folder is not None
            head = "own" if has_native_head(target.folder, drafter.config, config.steps) else "last layer, as a head"
            ctx.log(f"starts from the target's {head}")
    earlier = drafter.frequent_tokens  # of the answers of its earlier training; without new training it keeps them
    if (earlier is None or config.steps) and "train" in stored_splits(ctx.inputs["trajectories"]):  # never evaluation's
        before = None if earlier is None else earlier.cpu()
        drafter.frequent_tokens = frequent_tokens(counts, before).to(target.device)
    data = TrainingData(trajectories=stored.trajectories, sampling=stored.sampling)
    training = SftTraining(drafter, target, data, config, seed=ctx.seed, ranks=ranks)
    covered = drafter.head_over(target.head_weight, None).token_ids
    coverage = 1.0 if covered is None else float(counts[covered.cpu()].sum() / counts.sum())
    ctx.log(f"{training}; {coverage:.2%} of the answers' tokens can be proposed")
    if drafter.has_own_head and config.head_tokens is not None:
        ctx.log("sft.head_tokens is ignored: this drafter has its own head (drafter.draft_vocab_size)")
    totals = training.train(ctx)
    if not ranks.is_main:
        return
    training.save(ctx, "sft", () if start is None else lineage_from(start), totals)
    ctx.summary(
        **totals,
        parameters=sum(p.numel() for p in drafter.parameters()),
        trajectories=len(stored.trajectories),
        passes=training.passes,
        draft_vocabulary_coverage=coverage,
    )


def _start(ctx: StageContext, config: SftConfig) -> Path | None:
    """Return the checkpoint to continue from: the input, or `init_from`; None: random weights."""
    if "drafter" in ctx.inputs:
        return ctx.inputs["drafter"] / DRAFTER_FOLDER
    return drafter_source(config.init_from, config.init_revision) if config.init_from else None


def sft_loss(
    drafter: Drafter,
    batch: Batch,
    anchors: torch.Tensor,
    context: LossContext,
    stream: ResponseStream,
    temperature: float,
) -> LossReport:
    """Compute the weighted mean over all offsets inside the trajectory.

    stream: the resolved one, with scope `block`. temperature: that of the target's distribution.
    """
    started = time.perf_counter()
    blocks = draft_blocks(drafter, encode_batch(drafter, batch), batch, anchors)
    drafted = time.perf_counter()
    response = response_loss(blocks, context, stream, temperature)
    positions = int(response.positions.sum())
    return LossReport(
        response.sums.mean,
        anchors.numel(),
        positions,
        {"accuracy": response.accuracy},
        {"drafter": drafted - started, "head_and_loss": time.perf_counter() - drafted},
        count_operations(drafter, batch, anchors, positions, context.heads.drafter),
        streams=(response.sums,),
    )


class SftTraining(Trainer[SftConfig, TrainingData]):
    """Trains on the answers' own tokens. `response_loss` explains the effect of their sampling."""

    def _resolve(self) -> None:
        drafter, sampling = self.drafter, self.data.sampling
        self.stream = self.config.stream(drafter.recipe, sampled=not sampling.greedy)
        self._sampling = sampling if drafter.samples_proposals else GREEDY
        self._temperature = (sampling.temperature or 1.0) if self._sampling.greedy else 1.0
        self._heads = HeadSource(drafter, self.target.head_weight, self.config)
        self.reads_target = self.stream.loss != "cross_entropy" or drafter.has_confidence

    def micro_batches(self, step: int, limit: int | None) -> Iterator[LossReport]:
        rank_slice, rng = self.rank_slice(step, limit), step_rng(self.seed, step)
        # for the full step, whatever part of it this rank trains
        shifts = rng.random(rank_slice.step_rows)[rank_slice.rows]
        heads = self._heads.sample(rng, [rank_slice.step_tokens])
        config = self.config
        context = LossContext(heads, self.target.head_weight, config.positions_per_chunk, self._sampling)
        for rows in rank_slice.micro_batches:
            batch = rank_slice.batch.select(rows)
            anchors = position_anchors(
                batch.trajectories, config.anchors_per_sequence, shifts[rows], self.target.device
            )
            report = sft_loss(self.drafter, batch, anchors, context, self.stream, self._temperature)
            report.is_full_step = rank_slice.is_one_batch
            yield report

    def __str__(self) -> str:
        """Describe the training in one line."""
        weights = self.stream.weights()
        formula = f"exp(-(k-1)/{weights.gamma:.3g})" if weights.kind == "exponential" else "D-PACE's"
        return (
            f"{self.stream.loss} at all offsets, weight {formula} at offset k; {len(self.usable)} answers, "
            f"{self.passes:.3g} passes over each"
        )
