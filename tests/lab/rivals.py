"""Trainings of the refresh benchmark that need more than a loss of logits.

`visible-prefix` is that of D2SD's second drafter (arXiv 2606.04446), which drafts what follows a visible prefix of the
block. It was implemented from the paper's abstract and from the source of NVIDIA NeMo's implementation (0.9 is its
default). `shuffled` is OPD whose weights belong to other blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.base import Drafter, PreparedDrafter
from draftsmith.stages.drafters.block_attention import ContextMask
from draftsmith.stages.drafters.checkpoint import lineage_from, load_drafter
from draftsmith.stages.drafters.dflash.model import DFlashDrafter, FeatureContext
from draftsmith.stages.replay.chains import committed_tokens, draft
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.runtime.ranks import ALONE
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.batches import Batch, step_rng
from draftsmith.stages.training.config import OpdConfig, SftConfig
from draftsmith.stages.training.drafted_blocks import (
    DraftingView,
    block_labels,
    count_operations,
    encode_batch,
    position_anchors,
    tokens_at,
)
from draftsmith.stages.training.loss_report import LossReport, WeightedMean
from draftsmith.stages.training.opd.anchor_sources import RandomAnchors
from draftsmith.stages.training.opd.body import MinedData, OpdTraining
from draftsmith.stages.training.opd.step import OpdStep
from draftsmith.stages.training.opd.verify_steps import StepAnchors, load_mined
from draftsmith.stages.training.response_loss import TargetSignal, head_loss
from draftsmith.stages.training.sft.body import SftTraining
from draftsmith.stages.training.softmax_heads import LossContext
from draftsmith.stages.training.trainer import TrainingData, load_answers

PREFIX_BASE = 0.9  # the probability of l visible tokens is proportional to this power of l


def run(ctx: StageContext, name: str, config: Mapping[str, Any]) -> None:
    """Continue training the drafter that is the input, as stages `sft` and `opd` do."""
    stored, target = load_answers(ctx, ALONE), Target.load(ctx.inputs["target"])
    folder = ctx.inputs["drafter"] / DRAFTER_FOLDER
    drafter = load_drafter(folder, target, torch.float32)
    training: VisiblePrefix | ShuffledSteps
    if name == "visible-prefix":
        data = TrainingData(trajectories=stored.trajectories, sampling=stored.sampling)
        training = VisiblePrefix(drafter, target, data, SftConfig.model_validate(config), seed=ctx.seed)
    else:
        table = load_mined(ctx.inputs["mined"], stored.trajectories, drafter.block_size, whole=False)
        mined = MinedData(trajectories=stored.trajectories, sampling=stored.sampling, mined=table)
        training = ShuffledSteps(drafter, target, mined, OpdConfig.model_validate(config), seed=ctx.seed)
    totals = training.train(ctx)
    training.save(ctx, name, lineage_from(folder), totals)
    ctx.summary(**totals)


class ShuffledSteps(OpdTraining):
    """OPD on random anchors, each with the verify step of another block of the training step.

    Offsets have the same weights as without the shuffle, on average, but not where their own block was accepted.
    """

    def _resolve(self) -> None:
        super()._resolve()
        self.memory = ShuffledAnchors(self.drafter, self.config.anchors_per_sequence)
        self._step = OpdStep(self.drafter, self.target, self.memory, self._step.options)


class ShuffledAnchors(RandomAnchors):
    """Random anchors with the numbers of committed tokens of each other."""

    def __init__(self, drafter: Drafter, per_sequence: int):
        super().__init__(per_sequence)
        self.drafter = drafter

    def sample(self, step: int, indices: Sequence[int], view: DraftingView, phases: np.ndarray) -> StepAnchors:
        found = super().sample(step, indices, view, phases)
        positions, K = found.anchors, self.drafter.block_size - 1
        tokens = committed_tokens(view.batch.trajectories, K, positions.device)
        drafter = PreparedDrafter(self.drafter, view.head, K + 1)
        accepted = draft(drafter, view.context, tokens, positions, view.sampler, with_proposals=False).accepted
        order = np.random.default_rng(step).permutation(positions.numel())
        accepted = accepted.flatten()[to_device(order, positions.device)].view_as(accepted)
        nothing = torch.zeros((*positions.shape, K), dtype=torch.int64, device=positions.device)
        lengths = to_device([[len(t.tokens)] for t in view.batch.trajectories], positions.device)
        steps = Steps(lengths, positions, accepted, nothing, nothing * torch.nan)
        return replace(found, steps=steps)


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

    def loss(self, batch: Batch, anchors: torch.Tensor, context: LossContext) -> LossReport:
        """Return the loss of a step."""
        assert isinstance(self.drafter, DFlashDrafter)
        K = self.drafter.block_size - 1
        rng = np.random.default_rng([self.seed, int(anchors.sum())])  # the same in a resumed training
        chance = PREFIX_BASE ** np.arange(1, K + 1)
        visible = to_device(rng.choice(np.arange(1, K + 1), anchors.shape, p=chance / chance.sum()), anchors.device)
        hidden = hidden_after_prefix(self.drafter, encode_batch(self.drafter, batch), batch, anchors, visible)
        labels, inside = block_labels(batch, anchors, K)
        distance = torch.arange(1, K + 1, device=inside.device) - visible[..., None]  # k - l
        mask = inside & (distance >= 0)
        labels = labels[mask]
        columns, _ = context.heads.drafter.to_columns(labels)
        losses = head_loss(hidden[mask], TargetSignal(labels, columns, None, context, self._temperature), self.stream)
        sums = WeightedMean.from_values(losses.terms, torch.exp(-distance / self.stream.weights().gamma)[mask])
        operations = count_operations(self.drafter, batch, anchors, len(labels), context.heads.drafter)
        return LossReport(sums.mean, anchors.numel(), len(labels), operations=operations, streams=(sums,))


def hidden_after_prefix(
    drafter: DFlashDrafter, context: object, batch: Batch, anchors: torch.Tensor, visible: torch.Tensor
) -> torch.Tensor:
    """Return `DFlashDrafter.block_hidden` [B, A, K, H] where the first `visible` [B, A] tokens of a block are known."""
    assert isinstance(context, FeatureContext)
    tokens = tokens_at(batch, anchors, 0, drafter.block_size)  # [B, A, K + 1]
    offsets = torch.arange(drafter.block_size, device=tokens.device)
    block = tokens.masked_fill(offsets >= visible[..., None], drafter.mask_token_id)
    x = functional.embedding(block.flatten(1), drafter._embedding[0]).to(drafter.norm.weight.dtype)
    x = x * drafter.embedding_scale
    rope = drafter._rope((anchors[..., None] + offsets).flatten(1), x)
    for layer, span, keys_values in zip(drafter._layers(), drafter.spans, context.layers, strict=True):
        x = layer(x, rope, keys_values, ContextMask(anchors, None, span.window, span.causal, False))
    return drafter.norm(x).unflatten(1, block.shape[1:])[:, :, 1:]
