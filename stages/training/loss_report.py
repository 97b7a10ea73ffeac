"""The report of a step's loss, as sums, so that the reports of several micro-batches can be merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch


class Ratio(float):
    """A quotient that remembers its two terms, so that quotients of several micro-batches can be merged."""

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
    weight: torch.Tensor  # Σ w; of all streams where they are pooled

    @classmethod
    def from_values(cls, values: torch.Tensor, weights: torch.Tensor, factor: float = 1.0) -> WeightedMean:
        """Sum values [N] with weights [N]."""
        return cls(factor, (weights * values).sum(), weights.sum())

    @classmethod
    def joined(cls, parts: Sequence[WeightedMean]) -> WeightedMean:
        """Return the mean over the values of all parts, which have one factor."""
        totals, weights = ([part.total for part in parts], [part.weight for part in parts])
        return cls(parts[0].factor, torch.stack(totals).sum(), torch.stack(weights).sum())

    @property
    def mean(self) -> torch.Tensor:
        """Return the mean, with gradient; 0 without values."""
        return self.total / self.weight.clamp(min=1e-9)

    def ratio(self) -> Ratio:
        """Return the mean without gradient, to be merged with the means of other micro-batches."""
        return Ratio(float(self.total.detach()), float(self.weight))


@dataclass
class LossReport:
    """The loss of one step, or of one of its micro-batches, and its parts."""

    loss: torch.Tensor
    blocks: int  # trained blocks
    positions: int  # block positions with a loss
    metrics: dict[str, float] = field(default_factory=dict)
    # mining, drafter, head_and_loss: on an accelerator one phase may wait for kernels that the one before it queued
    seconds: dict[str, float] = field(default_factory=dict)
    operations: float = 0.0  # operations of the drafter's matrix products, forward and backward
    streams: tuple[WeightedMean, ...] = ()  # the loss is the sum of their means
    is_full_step: bool = True  # not one of several micro-batches
    step_weights: tuple[float, ...] | None = None  # of a micro-batch with several streams: Σ w of each in the full step
