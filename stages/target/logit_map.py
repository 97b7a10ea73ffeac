"""From the products of a target's head to its logits: scaled, soft-capped, and at a temperature."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LogitMap:
    """logit = cap · tanh(scale · x / cap) of a product x of the head with a hidden state; scale · x without a cap. A
    temperature divides what comes out."""

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def plain(self) -> bool:
        """Are the products the logits?"""
        return self.scale == self.temperature == 1.0 and self.softcap is None

    def at(self, temperature: float) -> LogitMap:
        """Return the logits of the distribution that is sampled from at a temperature above 0."""
        return replace(self, temperature=self.temperature * temperature)

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Any shape → the same; a new tensor unless nothing is to be done."""
        scaled = products if self.scale == 1.0 else products * self.scale
        logits = scaled if self.softcap is None else (scaled / self.softcap).tanh() * self.softcap
        return logits if self.temperature == 1.0 else logits / self.temperature


PLAIN = LogitMap()
