"""A training of another paper that needs more than a loss of logits, as a trainer of the refresh benchmark.

It is that of D2SD's second drafter (arXiv 2606.04446), which drafts what follows a visible prefix of the block. It was
implemented from the paper's abstract and from the source of NVIDIA NeMo's implementation (0.9 is its default).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch.nn import functional

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.block_attention import ContextMask
from draftsmith.stages.drafters.checkpoint import lineage_from, load_drafter
from draftsmith.stages.drafters.dflash.model import DFlashDrafter, FeatureContext
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.runtime.ranks import ALONE
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.training.batches import Batch, step_rng
from draftsmith.stages.training.blocks import (
    Anchors,
    LossContext,
    LossReport,
    WeightedMean,
    block_labels,
    count_operations,
    encode_batch,
    position_anchors,
    tokens_at,
)
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.response_loss import TargetSignal, head_loss
from draftsmith.stages.training.sft.trainer import SftTraining
from draftsmith.stages.training.trainer import TrainingData, load_answers

PREFIX_BASE = 0.9  # the probability of l visible tokens is proportional to this power of l


def run(ctx: StageContext, config: SftConfig) -> None:
    """Continue training the drafter that is the input, as stage `sft` does."""
    stored, target = load_answers(ctx, ALONE), Target.load(ctx.inputs["target"])
    folder = ctx.inputs["drafter"] / DRAFTER_FOLDER
    drafter = load_drafter(folder, target, torch.float32)
    data = TrainingData(trajectories=stored.trajectories, sampling=stored.sampling)
    training = VisiblePrefix(drafter, target, data, config, seed=ctx.seed)
    totals = training.train(ctx)
    training.save(ctx, "sft", lineage_from(folder), totals)
    ctx.summary(**totals)


class VisiblePrefix(SftTraining):
    """D2SD's training of the drafter that drafts again: the first l tokens of a block are visible, the rest is trained.

    Pr(l) ∝ 0.9^l with l = 1 for the anchor alone, and the weight of offset k is exp(-(k - l) / γ). In D2SD this drafter
    drafts again after another one; here it serves alone, from l = 1.
    """

    def micro_batches(self, step: int, limit: int | None) -> Iterator[LossReport]:
        rank_slice, rng, config = self.rank_slice(step, limit), step_rng(self.seed, step), self.config
        phases = rng.random(rank_slice.step_rows)
        heads = self._heads.sample(rng, [rank_slice.step_tokens])
        context = LossContext(heads, self.target.head_weight, config.positions_per_chunk, self._sampling)
        batch = rank_slice.batch
        yield self.loss(
            batch,
            position_anchors(batch.trajectories, config.anchors_per_sequence, phases, self.target.device),
            context,
        )

    def loss(self, batch: Batch, anchors: Anchors, context: LossContext) -> LossReport:
        """Return the loss of a step."""
        assert isinstance(self.drafter, DFlashDrafter)
        K = self.drafter.block_size - 1
        rng = np.random.default_rng([self.seed, int(anchors.positions.sum())])  # the same in a resumed training
        chance = PREFIX_BASE ** np.arange(1, K + 1)
        visible = to_device(rng.choice(np.arange(1, K + 1), anchors.positions.shape, p=chance / chance.sum()),
                            anchors.positions.device)  # fmt: skip
        hidden = hidden_after_prefix(self.drafter, encode_batch(self.drafter, batch), batch, anchors, visible)
        labels, inside = block_labels(batch, anchors, K)
        distance = torch.arange(1, K + 1, device=inside.device) - visible[..., None]  # k - l
        mask = inside & (distance >= 0)
        labels = labels[mask]
        columns, _ = context.heads.drafter.to_columns(labels)
        losses = head_loss(hidden[mask], TargetSignal(labels, columns, None, context, self._temperature), self.stream)
        sums = WeightedMean.from_values(losses.terms, torch.exp(-distance / self.stream.weights().gamma)[mask])
        operations = count_operations(self.drafter, batch, anchors, len(labels), context.heads.drafter)
        return LossReport(sums.mean, anchors.blocks, len(labels), operations=operations, streams=(sums,))


def hidden_after_prefix(
    drafter: DFlashDrafter, context: object, batch: Batch, anchors: Anchors, visible: torch.Tensor
) -> torch.Tensor:
    """Return `DFlashDrafter.block_hidden` [B, A, K, H] where the first `visible` [B, A] tokens of a block are known."""
    assert isinstance(context, FeatureContext)
    tokens = tokens_at(batch, anchors, 0, drafter.block_size)  # [B, A, K + 1]
    offsets = torch.arange(drafter.block_size, device=tokens.device)
    block = tokens.masked_fill(offsets >= visible[..., None], drafter.mask_token_id)
    x = functional.embedding(block.flatten(1), drafter._embedding[0]).to(drafter.norm.weight.dtype)
    x = x * drafter.embedding_scale
    rope = drafter._rope((anchors.positions[..., None] + offsets).flatten(1), x)
    for layer, span, keys_values in zip(drafter._layers(), drafter.spans, context.layers, strict=True):
        x = layer(x, rope, keys_values, ContextMask(anchors.positions, None, span.window, span.causal, False))
    return drafter.norm(x).unflatten(1, block.shape[1:])[:, :, 1:]
