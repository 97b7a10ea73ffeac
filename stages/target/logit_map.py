"""The map from the products of a target's head to its logits: a scale, a soft cap and a temperature."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LogitMap:
    """logit = cap · tanh(scale · x / cap) / temperature of a product x of the head with a hidden state.

    Without a cap it is scale · x / temperature.
    """

    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def is_identity(self) -> bool:
        """Return whether the products are the logits."""
        return self.scale == self.temperature == 1.0 and self.softcap is None

    def with_temperature(self, temperature: float) -> LogitMap:
        """Return the map to the logits that are sampled from at a temperature above 0."""
        return replace(self, temperature=self.temperature * temperature)

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Map products of any shape; the result is a new tensor unless this is the identity."""
        scaled = products if self.scale == 1.0 else products * self.scale
        logits = scaled if self.softcap is None else (scaled / self.softcap).tanh() * self.softcap
        return logits if self.temperature == 1.0 else logits / self.temperature


IDENTITY = LogitMap()
