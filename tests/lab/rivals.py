"""Trainings of other papers that need more than a loss of logits, as trainers of the refresh benchmark.

`vat`: verification-aware training (arXiv 2608.30135). `visible_prefix`: the training of D2SD's second drafter
(arXiv 2606.04446), which drafts what follows a prefix of the block. Both were implemented from the papers' abstracts,
from others' notes on them and, of D2SD, from the description of NVIDIA NeMo's implementation (0.9 is its default).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np
import torch
from torch import nn
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
    DraftedBlocks,
    LossContext,
    LossReport,
    WeightedMean,
    block_labels,
    count_operations,
    draft_blocks,
    encode_batch,
    position_anchors,
    tokens_at,
)
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.response_loss import PositionLosses, TargetSignal, head_loss
from draftsmith.stages.training.sft.trainer import SftTraining
from draftsmith.stages.training.trainer import TrainingData, load_answers

PREFIX_BASE = 0.9  # the probability of l visible tokens is proportional to this power of l
BETA = 1.0  # weight of VAT's verification head

Indices: TypeAlias = tuple[torch.Tensor, ...]  # of the positions of a mask [B, A, K]


def run(ctx: StageContext, config: SftConfig, trainer: type[_Rival]) -> None:
    """Continue training the drafter that is the input, as stage `sft` does."""
    stored, target = load_answers(ctx, ALONE), Target.load(ctx.inputs["target"])
    folder = ctx.inputs["drafter"] / DRAFTER_FOLDER
    drafter = load_drafter(folder, target, torch.float32)
    data = TrainingData(trajectories=stored.trajectories, sampling=stored.sampling)
    training = trainer(drafter, target, data, config, seed=ctx.seed)
    totals = training.train(ctx)
    training.save(ctx, "sft", lineage_from(folder), totals)
    ctx.summary(**totals)


class _Rival(SftTraining):
    """SFT with another loss; DFlash alone, in steps of one micro-batch."""

    def micro_batches(self, step: int, limit: int | None) -> Iterator[LossReport]:
        rank_slice, rng, config = self.rank_slice(step, limit), step_rng(self.seed, step), self.config
        phases = rng.random(rank_slice.step_rows)
        heads = self._heads.sample(rng, [rank_slice.step_tokens])
        context = LossContext(heads, self.target.head_weight, config.positions_per_chunk, self._sampling)
        batch = rank_slice.batch
        anchors = position_anchors(batch.trajectories, config.anchors_per_sequence, phases, self.target.device)
        yield self.loss(batch, anchors, context)

    @abstractmethod
    def loss(self, batch: Batch, anchors: Anchors, context: LossContext) -> LossReport:
        """Return the loss of a step."""

    def losses_at(
        self, blocks: DraftedBlocks, context: LossContext, mask: torch.Tensor
    ) -> tuple[Indices, Callable[[str], PositionLosses]]:
        """Return the indices of the mask's positions [B, A, K], and what computes a loss there by its name."""
        batch, hidden = blocks.batch, blocks.hidden
        indices = mask.nonzero(as_tuple=True)
        labels, _ = block_labels(batch, blocks.anchors, hidden.shape[2])
        columns, _ = context.heads.drafter.to_columns(labels)
        # the target's hidden state that predicts offset k lies at position anchor + k - 1
        before = blocks.anchors.positions[..., None] + torch.arange(hidden.shape[2], device=hidden.device)
        at = before.clamp(max=batch.tokens.shape[1] - 1)
        predicted_by = None if batch.hidden is None else batch.hidden[indices[0], at[indices]]
        signal = TargetSignal(labels[indices], columns[indices], predicted_by, context, self._temperature)

        def compute(name: str) -> PositionLosses:
            return head_loss(hidden[indices], signal, self.stream.model_copy(update={"loss": name}))

        return indices, compute

    def report(
        self,
        blocks: DraftedBlocks,
        context: LossContext,
        sums: WeightedMean,
        positions: int,
        extra: torch.Tensor | float,
    ) -> LossReport:
        """Return the report of a step. extra: a second term of the loss."""
        operations = count_operations(self.drafter, blocks.batch, blocks.anchors, positions, context.heads.drafter)
        return LossReport(sums.mean + extra, blocks.anchors.blocks, positions, operations=operations, streams=(sums,))


class Vat(_Rival):
    """Verification-aware training: soft and hard loss, weights from the first rejection on, and a verification head.

    A proposal is accepted if it is the answer's token, as verification does for a drafter that proposes argmaxes. The
    head is a dense layer on the drafter's hidden states that predicts whether verification reaches and accepts an
    offset; its gradient trains the drafter too. It is not saved.
    """

    def _resolve(self) -> None:
        super()._resolve()
        torch.manual_seed(self.seed)
        self.verification = nn.Linear(self.target.head_weight.shape[1], 1)
        self.drafter.add_module("verification", self.verification)  # the optimiser takes the drafter's parameters

    @property
    def reads_target(self) -> bool:
        return True

    def loss(self, batch: Batch, anchors: Anchors, context: LossContext) -> LossReport:
        blocks = draft_blocks(self.drafter, encode_batch(self.drafter, batch), batch, anchors)
        K = blocks.hidden.shape[2]
        _, mask = block_labels(batch, anchors, K)
        indices, compute = self.losses_at(blocks, context, mask)
        soft, hard = compute("forward_kl"), compute("cross_entropy")
        correct = torch.zeros_like(mask)
        correct[indices] = hard.correct
        offsets = torch.arange(1, K + 1, device=mask.device)
        weights, survives = vat_weights(correct, offsets, self.stream.weights().gamma)
        logits = self.verification(blocks.hidden)[..., 0][indices]
        head = functional.binary_cross_entropy_with_logits(logits, survives[indices].float())
        sums = WeightedMean.from_values(soft.terms + hard.terms, weights[indices])
        return self.report(blocks, context, sums, len(indices[0]), BETA * head)

    def save(self, ctx: StageContext, stage: str, parents: tuple[str, ...], totals: dict[str, float]) -> None:
        del self.drafter.verification
        super().save(ctx, stage, parents, totals)


def vat_weights(correct: torch.Tensor, offsets: torch.Tensor, gamma: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return VAT's weights [B, A, K] and whether verification accepts each offset.

    1 up to the first rejection k*, exp(-(k - k*) / gamma) after it. correct: bool [B, A, K]. offsets: [K], 1 … K.
    """
    first = correct.long().cumprod(-1).sum(-1, keepdim=True) + 1
    return torch.exp(-(offsets - first).clamp(min=0) / gamma), offsets < first


class VisiblePrefix(_Rival):
    """D2SD's training of the drafter that drafts again: the first l tokens of a block are visible, the rest is trained.

    Pr(l) ∝ 0.9^l with l = 1 for the anchor alone, and the weight of offset k is exp(-(k - l) / γ). In D2SD this drafter
    drafts again after another one; here it serves alone, from l = 1.
    """

    def loss(self, batch: Batch, anchors: Anchors, context: LossContext) -> LossReport:
        assert isinstance(self.drafter, DFlashDrafter)
        K = self.drafter.block_size - 1
        rng = np.random.default_rng([self.seed, int(anchors.positions.sum())])  # the same in a resumed training
        chance = PREFIX_BASE ** np.arange(1, K + 1)
        visible = to_device(rng.choice(np.arange(1, K + 1), anchors.positions.shape, p=chance / chance.sum()),
                            anchors.positions.device)  # fmt: skip
        hidden = hidden_after_prefix(self.drafter, encode_batch(self.drafter, batch), batch, anchors, visible)
        _, inside = block_labels(batch, anchors, K)
        distance = torch.arange(1, K + 1, device=inside.device) - visible[..., None]  # k - l
        blocks = DraftedBlocks(batch, anchors, hidden)
        indices, compute = self.losses_at(blocks, context, inside & (distance >= 0))
        weights = torch.exp(-distance / self.stream.weights().gamma)
        sums = WeightedMean.from_values(compute("cross_entropy").terms, weights[indices])
        return self.report(blocks, context, sums, len(indices[0]), 0.0)


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
