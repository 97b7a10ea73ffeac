"""From the products of a target's head to its logits: scaled, then soft-capped."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LogitMap:
    """logit = cap · tanh(scale · x / cap) of a product x of the head with a hidden state; scale · x without a cap."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def plain(self) -> bool:
        """Are the products the logits?"""
        return self.scale == 1.0 and self.softcap is None

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Any shape → the same; a new tensor unless nothing is to be done."""
        scaled = products if self.scale == 1.0 else products * self.scale
        return scaled if self.softcap is None else (scaled / self.softcap).tanh() * self.softcap

    def slope(self, logits: torch.Tensor) -> torch.Tensor | float:
        """d logit / d product, from the logits."""
        return self.scale if self.softcap is None else (1 - (logits / self.softcap).square()) * self.scale


PLAIN = LogitMap()
