"""What SFT and OPD share: blocks behind anchors, their labels, and the report of a step's loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Context, Drafter, StepShape
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.replay.sampled import TargetSampler
from draftsmith.stages.training.batches import Batch


@dataclass(frozen=True)
class Anchors:
    """Where blocks are trained: A anchors a row, rows with fewer padded with copies that have valid = False."""

    positions: torch.Tensor  # [B, A] absolute
    valid: torch.Tensor  # bool [B, A]

    @property
    def blocks(self) -> int:
        return int(self.valid.sum())

    def rows(self, part: slice | list[int]) -> Anchors:
        """Some rows of the batch."""
        return Anchors(self.positions[part], self.valid[part])


@dataclass(frozen=True)
class View:
    """A batch as the drafter sees it in one step."""

    batch: Batch
    context: Context  # of its trajectories, with gradient
    # Holds every token of the batch, so what is right can be proposed; under a reduced head a wrong token that it lacks
    # cannot, and is not seen to be rejected.
    head: Head
    text: TargetSampler | None = None  # where proposals are drawn; left out, they are argmaxes


class Share(float):
    """A quotient that remembers what it is of, so that those of several micro-batches become one."""

    part: float
    whole: float

    def __new__(cls, part: float, whole: float) -> Share:
        share = super().__new__(cls, part / whole if whole else 0.0)
        share.part, share.whole = float(part), float(whole)
        return share

    def __reduce__(self) -> tuple[type[Share], tuple[float, float]]:
        return Share, (self.part, self.whole)

    @classmethod
    def merged(cls, values: Sequence[float]) -> float:
        """The share of all together; plain numbers are counts and add up."""
        if isinstance(values[0], Share):
            shares = [value for value in values if isinstance(value, Share)]
            return cls(sum(s.part for s in shares), sum(s.whole for s in shares))
        return sum(values)


@dataclass(frozen=True)
class Weighted:
    """A stream's sums: its mean is total / weight."""

    factor: float  # of the mean in the loss
    total: torch.Tensor  # Σ w · v, with gradient
    weight: torch.Tensor  # Σ w

    @classmethod
    def of(cls, values: torch.Tensor, weights: torch.Tensor, factor: float = 1.0) -> Weighted:
        return cls(factor, (weights * values).sum(), weights.sum())

    @property
    def mean(self) -> torch.Tensor:
        """0 without any."""
        return self.total / self.weight.clamp(min=1e-9)

    def share(self) -> Share:
        """The mean, to be merged with those of other micro-batches."""
        return Share(float(self.total.detach()), float(self.weight))


@dataclass
class LossReport:
    """The loss of one step, or of one of its micro-batches, and what it was made of."""

    loss: torch.Tensor
    blocks: int  # trained blocks
    positions: int  # block positions with a loss
    figures: dict[str, float] = field(default_factory=dict)
    # mining, drafter, head_and_loss: on an accelerator a part may wait for kernels that the one before it queued
    seconds: dict[str, float] = field(default_factory=dict)
    operations: float = 0.0  # of the drafter's matrix products, forward and backward
    streams: tuple[Weighted, ...] = ()  # that the loss is the sum of the means of
    alone: bool = True  # a whole step, not one of its micro-batches
    whole: tuple[float, ...] | None = None  # of a micro-batch with several streams: Σ w of each in the whole step


def context_of(drafter: Drafter, batch: Batch) -> Context:
    """What the drafter knows of the batch's trajectories, with gradient."""
    return drafter.encode(batch.features, batch.tokens, batch.positions)


def block_hidden(drafter: Drafter, context: Context, batch: Batch, anchors: Anchors) -> torch.Tensor:
    """[B, A, K, H] for the batch's anchors, on the trajectories' own tokens."""
    return drafter.block_hidden(context, tokens_at(batch, anchors, 0, drafter.block_size - 1), anchors.positions)


def block_hidden_on(
    drafter: Drafter, context: Context, batch: Batch, anchors: Anchors, proposed: torch.Tensor
) -> torch.Tensor:
    """[B, A, K, H] on the drafter's own proposals [B, A, K]: what it felt when it made them."""
    before = torch.cat([tokens_at(batch, anchors, 0, 1), proposed[..., :-1]], -1)
    return drafter.block_hidden(context, before, anchors.positions)


def labels_of(batch: Batch, anchors: Anchors, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Committed token at each offset 1 … K [B, A, K], and whether the trajectory reaches that far."""
    at = anchors.positions[..., None] + torch.arange(1, K + 1, device=anchors.positions.device)
    lengths = torch.tensor([len(t.tokens) for t in batch.trajectories], device=at.device)
    return tokens_at(batch, anchors, 1, K), (at < lengths[:, None, None]) & anchors.valid[..., None]


def tokens_at(batch: Batch, anchors: Anchors, first: int, count: int) -> torch.Tensor:
    """[B, A, count] of the offsets first, first + 1, …; the row's last token beyond its end."""
    offsets = torch.arange(first, first + count, device=anchors.positions.device)
    at = (anchors.positions[..., None] + offsets).clamp(max=batch.tokens.shape[1] - 1)
    return batch.tokens.gather(1, at.flatten(1)).view_as(at)


def operations_of(
    drafter: Drafter, batch: Batch, anchors: Anchors, positions: int, head: Head, *, prefixes: int = 1
) -> float:
    """Of one step that trains `positions` block positions behind these anchors, with softmaxes over `head`."""
    rows, width = batch.tokens.shape
    return drafter.training_operations(
        StepShape(rows, width, anchors.positions, positions, head.weight.shape[0], prefixes)
    )


def position_anchors(
    trajectories: Sequence[Trajectory], per_sequence: int, rng: np.random.Generator, device: torch.device
) -> Anchors:
    """`per_sequence` positions of each response, different ones where it is long enough."""
    return pad_anchors(drawn_positions(trajectories, per_sequence, rng.random(len(trajectories))), device)


def drawn_positions(trajectories: Sequence[Trajectory], per_sequence: int, phases: np.ndarray) -> list[np.ndarray]:
    """The same as [per_sequence] of each, at its phase in [0, 1) of `phases` [B].

    Raises DraftsmithError for a response without a position that has a token behind it.
    """
    for t in trajectories:
        if t.last_anchor < t.first_anchor:
            raise DraftsmithError(f"trajectory {t.trajectory_id}: an answer of one token trains nothing: leave it out")
    return [
        evenly(np.arange(t.first_anchor, t.last_anchor + 1), per_sequence, phase)
        for t, phase in zip(trajectories, phases, strict=True)
    ]


def evenly(candidates: np.ndarray, count: int, phase: float) -> np.ndarray:
    """`count` of the candidates [N], in order: one of every N/count neighbours, all at one phase in [0, 1).

    Systematic sampling: at a random phase each is as probable as if it were drawn alone, but the blocks behind them
    overlap little, and a step sees the whole response. One is drawn again only where there are fewer, so that every
    step of training has the same number of blocks whatever its anchors are.
    """
    places = ((np.arange(count) + phase) * len(candidates) / count).astype(np.int64)
    return candidates[np.minimum(places, len(candidates) - 1)]  # rounding


def pad_anchors(chosen: Sequence[np.ndarray], device: torch.device) -> Anchors:
    """Positions of each row, padded with copies of the last one that are not valid."""
    A = max(len(row) for row in chosen)
    positions = np.stack([np.pad(row, (0, A - len(row)), mode="edge") for row in chosen])
    valid = np.stack([np.arange(A) < len(row) for row in chosen])
    return Anchors(torch.from_numpy(positions).to(device), torch.from_numpy(valid).to(device))
