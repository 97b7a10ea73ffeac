"""SFT's loss: all offsets of blocks behind anchors anywhere, in the form that the architecture's authors use.

DFlash (arXiv 2602.06036): cross-entropy on the committed token, weight exp(-(k-1)/γ) at offset k. EAGLE-3
(arXiv 2503.01840): the training-time test on the target's distribution over the draft vocabulary, 0.8 a step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.runtime.ranks import ALONE, Ranks
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.sampling import GREEDY, SamplingParams
from draftsmith.stages.training.batches import Batch, FeatureSource, Portion, parts_of, step_rng, trajectories_of_step
from draftsmith.stages.training.blocks import (
    Anchors,
    LossReport,
    block_hidden,
    context_of,
    operations_of,
    position_anchors,
)
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.lm_heads import Heads, HeadSource
from draftsmith.stages.training.loss_config import ResponseStream
from draftsmith.stages.training.response_loss import response_stream


def sft_loss(
    drafter: Drafter,
    batch: Batch,
    anchors: Anchors,
    heads: Heads,
    target_head: torch.Tensor,
    stream: ResponseStream,
    *,
    temperature: float,
    sampling: SamplingParams = GREEDY,
    positions_per_chunk: int,
) -> LossReport:
    """Weighted mean over all offsets inside the trajectory. stream: resolved, of scope `block`; target_head: [V, H].

    temperature: of the target's distribution. sampling: that of tokens and proposals.
    """
    started = time.perf_counter()
    hidden = block_hidden(drafter, context_of(drafter, batch), batch, anchors)
    drafted = time.perf_counter()
    response = response_stream(
        hidden,
        batch,
        anchors,
        heads,
        target_head,
        stream,
        temperature=temperature,
        sampling=sampling,
        positions_per_chunk=positions_per_chunk,
    )
    positions = int(response.positions.sum())
    return LossReport(
        response.sums.mean,
        anchors.blocks,
        positions,
        {"accuracy": response.accuracy},
        {"drafter": drafted - started, "head_and_loss": time.perf_counter() - drafted},
        operations_of(drafter, batch, anchors, positions, heads.drafter),
        streams=(response.sums,),
    )


class SftTraining:
    """SFT put together: `loss(step)` depends on nothing but the step and the drafter's weights."""

    def __init__(
        self,
        drafter: Drafter,
        target: Target,
        trajectories: Sequence[Trajectory],
        config: SftConfig,
        *,
        sampling: SamplingParams = GREEDY,
        seed: int = 0,
        ranks: Ranks = ALONE,
    ):
        """drafter: float32 weights that are to be trained. sampling: that of the trajectories: see
        `response.py` for what it is to a drafter that draws its proposals."""
        self.drafter, self.target, self.config, self.seed, self.ranks = drafter, target, config, seed, ranks
        self._trajectories = trajectories
        self.stream = config.stream(drafter.recipe, sampled=not sampling.greedy)
        self._sampling = sampling if drafter.samples_proposals else GREEDY
        self._temperature = (sampling.temperature or 1.0) if self._sampling.greedy else 1.0
        self._heads = HeadSource(drafter, target.head_weight, config)
        self._features = FeatureSource(
            target,
            drafter.target_layer_ids,
            trajectories,
            tokens_per_group=config.tokens_per_target_forward,
            memory_mb=config.feature_memory_mb,
            with_hidden=self.stream.asks_target or drafter.has_confidence,
        )
        self._count = len(trajectories)

    def loss(self, step: int) -> LossReport:
        """Of optimiser step `step` as one batch, with gradient."""
        (report,) = self.micro_batches(step, limit=None)
        return report

    def micro_batches(self, step: int, limit: int | None) -> Iterator[LossReport]:
        """The same in parts of at most `limit` tokens, those of this rank. Anchors and head are drawn for the whole
        step."""
        rng = step_rng(self.seed, step)
        chosen = self._chosen(step)
        trajectories = [self._trajectories[i] for i in chosen]
        portion = Portion.of_rank(trajectories, self.ranks, self.target.device)
        own = [chosen[row] for row in portion.rows]
        batch = self._features.batch(own, self._features.shared(chosen, self.ranks))
        if step + 1 < self.config.steps:
            self._features.prefetch(self._features.own(self._chosen(step + 1), self.ranks))
        anchors = position_anchors(trajectories, self.config.anchors_per_sequence, rng, self.target.device)
        heads = self._heads.draw(rng, [portion.tokens])
        anchors = anchors.rows(portion.rows)
        parts = parts_of(batch, anchors.positions.shape[1] * self.drafter.block_size, limit)
        for part in parts:
            report = sft_loss(
                self.drafter,
                batch.rows(part),
                anchors.rows(part),
                heads,
                self.target.head_weight,
                self.stream,
                temperature=self._temperature,
                sampling=self._sampling,
                positions_per_chunk=self.config.positions_per_chunk,
            )
            report.alone = len(parts) == self.ranks.world == 1
            yield report

    def _chosen(self, step: int) -> list[int]:
        return trajectories_of_step(self._count, self.config.sequences_per_step, step, self.seed)

    def __str__(self) -> str:
        """What is trained, in one line."""
        weights = self.stream.weights()
        of_offset = f"exp(-(k-1)/{weights.gamma:.3g})" if weights.kind == "exponential" else "D-PACE's"
        return (
            f"{self.stream.loss} at all offsets, weight {of_offset} at offset k; {self._count} answers, drawn "
            f"{self.config.passes(self._count):.3g} times each"
        )
