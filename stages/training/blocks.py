"""Blocks after anchors, their labels, what a loss reads, and the report of a step's loss: shared by SFT and OPD.

A drafter that has a head is trained over its draft vocabulary. One that uses the target's is trained over all tokens,
or over a sample that holds what matters: the most frequent tokens, every token of the step's answers, and fresh
random others, so that the drafter learns to give every token little probability: it also serves with the full head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Context, Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.spec import StepShape
from draftsmith.stages.replay.sampled import TargetSampler
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.targets.sampling import GREEDY, SamplingParams
from draftsmith.stages.training.batches import Batch
from draftsmith.stages.training.config import TrainingConfig


@dataclass(frozen=True)
class SoftmaxHeads:
    """Two heads over the same tokens, in the same order."""

    drafter: Head
    target: Head
    trained: bool  # whether the drafter's head belongs to its weights, so that it needs a gradient
    selector: Drafter | None = None  # the drafter, if it selects among the head's candidates (`Drafter.has_selector`)
    confidence: Callable[[torch.Tensor], torch.Tensor] | None = None  # `Drafter.confidence`, if it has one


class HeadSource:
    """The heads of every step of a training."""

    def __init__(self, drafter: Drafter, target_head: torch.Tensor, config: TrainingConfig):
        """Keep the target's head over the drafter's vocabulary, if that is its own. target_head: [V, H]."""
        self.drafter, self.target_head, self.config = drafter, target_head, config
        own = drafter.head_over(target_head, None) if drafter.has_own_head else None
        self._target_over_own = Head.over(target_head, own.token_ids, drafter.logit_map) if own else None

    @property
    def is_reduced(self) -> bool:
        """Return whether a step's head holds a sample of the tokens only."""
        return self._target_over_own is None and self.config.head_tokens is not None

    def sample(self, rng: np.random.Generator, needed: Sequence[torch.Tensor]) -> SoftmaxHeads:
        """Return the heads of one step. needed: token ids that a reduced head must hold, any shape."""
        if self._target_over_own is not None:
            return SoftmaxHeads(self.drafter.head_over(self.target_head, None), self._target_over_own, trained=True)
        head = self._target_sample(rng, needed)
        if self.drafter.corrects_head:
            corrected = self.drafter.head_over(self.target_head, head.token_ids)
            confidence = self.drafter.confidence if self.drafter.has_confidence else None
            return SoftmaxHeads(corrected, head, trained=True, confidence=confidence)
        return SoftmaxHeads(head, head, trained=False, selector=self.drafter if self.drafter.has_selector else None)

    def _target_sample(self, rng: np.random.Generator, needed: Sequence[torch.Tensor]) -> Head:
        """Return the target's head over a sample of its tokens, or the whole head if the config asks for no sample."""
        count, frequent, vocab = self.config.head_tokens, self.drafter.frequent_tokens, len(self.target_head)
        if count is None or frequent is None or count >= vocab:
            return Head(self.target_head, logit_map=self.drafter.logit_map)
        others = to_device(rng.integers(0, vocab, self.config.head_negatives), self.target_head.device)
        ids = torch.cat([frequent[:count], others, *(tokens.flatten() for tokens in needed)])
        return Head.over(self.target_head, ids, self.drafter.logit_map)


@dataclass(frozen=True)
class DraftingView:
    """A batch as the drafter sees it in one step."""

    batch: Batch
    context: Context  # of its trajectories, with gradient
    # Holds every token of the batch, so the right token can always be proposed. A wrong token that a reduced head lacks
    # cannot be, and its rejection goes unseen.
    head: Head
    sampler: TargetSampler | None = None  # if proposals are sampled; left out, they are argmaxes


@dataclass(frozen=True)
class DraftedBlocks:
    """Blocks of K proposals that the drafter drafted after the anchors of a batch."""

    batch: Batch
    anchors: torch.Tensor  # [B, A] absolute positions
    hidden: torch.Tensor  # [B, A, K, H] on the trajectories' own tokens, with gradient
    # [B, A, K, H] on the drafter's own proposals, where that is not the same (autoregressive drafters)
    on_proposals: torch.Tensor | None = None


@dataclass(frozen=True)
class LossContext:
    """What a loss reads beside the blocks; the same for all micro-batches of a step."""

    heads: SoftmaxHeads
    target_head: torch.Tensor  # [V, H] the target's own
    positions_per_chunk: int  # bounds the memory for logits
    sampling: SamplingParams = GREEDY  # that tokens and proposals are sampled with; greedy: proposals are argmaxes

    @property
    def proposal_temperature(self) -> float:
        """Return what divides the drafter's logits when it samples proposals."""
        return 1.0 if self.sampling.greedy else self.sampling.temperature


class Ratio(float):
    """A quotient that remembers its two terms, so that those of several micro-batches can be merged."""

    numerator: float
    denominator: float

    def __new__(cls, numerator: float, denominator: float) -> Ratio:
        ratio = super().__new__(cls, numerator / denominator if denominator else 0.0)
        ratio.numerator, ratio.denominator = float(numerator), float(denominator)
        return ratio

    def __reduce__(self) -> tuple[type[Ratio], tuple[float, float]]:
        return Ratio, (self.numerator, self.denominator)

    @classmethod
    def merge(cls, values: Sequence[float]) -> float:
        """Return the ratio of all values together; plain numbers are counts and add up."""
        if isinstance(values[0], Ratio):
            ratios = [value for value in values if isinstance(value, Ratio)]
            return cls(sum(r.numerator for r in ratios), sum(r.denominator for r in ratios))
        return sum(values)


@dataclass(frozen=True)
class WeightedMean:
    """A weighted mean as its two sums, and its factor in the loss."""

    factor: float
    total: torch.Tensor  # Σ w · v, with gradient
    weight: torch.Tensor  # Σ w

    @classmethod
    def from_values(cls, values: torch.Tensor, weights: torch.Tensor, factor: float = 1.0) -> WeightedMean:
        """Sum values [N] with weights [N]."""
        return cls(factor, (weights * values).sum(), weights.sum())

    @property
    def mean(self) -> torch.Tensor:
        """Return the mean, with gradient; 0 without any value."""
        return self.total / self.weight.clamp(min=1e-9)

    def ratio(self) -> Ratio:
        """Return the mean without gradient, to be merged with those of other micro-batches."""
        return Ratio(float(self.total.detach()), float(self.weight))


@dataclass
class LossReport:
    """The loss of one step, or of one of its micro-batches, and what it was made of."""

    loss: torch.Tensor
    blocks: int  # trained blocks
    positions: int  # block positions with a loss
    metrics: dict[str, float] = field(default_factory=dict)
    # mining, drafter, head_and_loss: on an accelerator one phase may wait for kernels that the one before it queued
    seconds: dict[str, float] = field(default_factory=dict)
    operations: float = 0.0  # of the drafter's matrix products, forward and backward
    streams: tuple[WeightedMean, ...] = ()  # the loss is the sum of their means
    is_full_step: bool = True  # not one of several micro-batches
    step_weights: tuple[float, ...] | None = None  # of a micro-batch with several streams: Σ w of each in the full step


def encode_batch(drafter: Drafter, batch: Batch) -> Context:
    """Return what the drafter knows of the batch's trajectories, with gradient."""
    return drafter.encode(batch.features, batch.tokens, batch.positions)


def draft_blocks(drafter: Drafter, context: Context, batch: Batch, anchors: torch.Tensor) -> DraftedBlocks:
    """Draft a block after every anchor of a batch, on the trajectories' own tokens."""
    tokens = tokens_at(batch, anchors, 0, drafter.block_size - 1)
    return DraftedBlocks(batch, anchors, drafter.block_hidden(context, tokens, anchors))


def hidden_on_proposals(
    drafter: Drafter, context: Context, blocks: DraftedBlocks, proposed: torch.Tensor
) -> torch.Tensor:
    """Return the hidden states [B, A, K, H] on the drafter's own proposals [B, A, K], as when it proposed them."""
    before = torch.cat([tokens_at(blocks.batch, blocks.anchors, 0, 1), proposed[..., :-1]], -1)
    return drafter.block_hidden(context, before, blocks.anchors)


def block_labels(batch: Batch, anchors: torch.Tensor, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the committed token at each offset 1 … K [B, A, K], and whether the trajectory reaches that far."""
    at = anchors[..., None] + torch.arange(1, K + 1, device=anchors.device)
    lengths = to_device([len(t.tokens) for t in batch.trajectories], at.device)
    return tokens_at(batch, anchors, 1, K), at < lengths[:, None, None]


def tokens_at(batch: Batch, anchors: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Return the tokens [B, A, count] at the offsets first, first + 1, …; beyond a row's end its last token."""
    offsets = torch.arange(first, first + count, device=anchors.device)
    at = (anchors[..., None] + offsets).clamp(max=batch.tokens.shape[1] - 1)
    return batch.tokens.gather(1, at.flatten(1)).view_as(at)


def count_operations(
    drafter: Drafter, batch: Batch, anchors: torch.Tensor, positions: int, head: Head, *, prefixes: int = 1
) -> float:
    """Count the operations of a step that trains `positions` block positions, with softmaxes over `head`."""
    rows, width = batch.tokens.shape
    at = anchors.cpu().numpy()
    shape = StepShape(rows, width, at, positions, head.weight.shape[0], prefixes, drafter.adapter_rank)
    return drafter.operations(shape)


def position_anchors(
    trajectories: Sequence[Trajectory], per_sequence: int, phases: np.ndarray, device: torch.device
) -> torch.Tensor:
    """Return `per_sequence` positions of each answer as anchors [B, A], spread evenly from its phase in [0, 1) on.

    phases: [B].
    Positions differ where the answer is long enough. Raises DraftsmithError for an answer without a position that has a
    following token.
    """
    for t in trajectories:
        if t.last_anchor < t.first_anchor:
            raise DraftsmithError(f"trajectory {t.trajectory_id}: the answer has one token. Leave it out.")
    positions = [
        systematic_sample(np.arange(t.first_anchor, t.last_anchor + 1), per_sequence, phase)
        for t, phase in zip(trajectories, phases, strict=True)
    ]
    return to_device(np.stack(positions), device)


def systematic_sample(candidates: np.ndarray, count: int, phase: float) -> np.ndarray:
    """Return `count` of the candidates [N], in order: one of every N/count neighbours, all at one phase in [0, 1).

    At a random phase each candidate is as probable as in independent sampling, but the blocks overlap little, and a
    step sees the whole answer. A candidate is taken twice only if there are fewer than `count`, so that every step of a
    training has the same number of blocks whatever its anchors are.
    """
    indices = ((np.arange(count) + phase) * len(candidates) / count).astype(np.int64)
    return candidates[np.minimum(indices, len(candidates) - 1)]  # rounding may reach N
