"""From the products of a target's head to its logits: scaled, soft-capped, and at a temperature."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

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
        """The logits of the law that is drawn from at a temperature above 0."""
        return replace(self, temperature=self.temperature * temperature)

    def __call__(self, products: torch.Tensor) -> torch.Tensor:
        """Any shape → the same; a new tensor unless nothing is to be done."""
        scaled = products if self.scale == 1.0 else products * self.scale
        logits = scaled if self.softcap is None else (scaled / self.softcap).tanh() * self.softcap
        return logits if self.temperature == 1.0 else logits / self.temperature


PLAIN = LogitMap()


def scale_of(embedding: nn.Module) -> float:
    """The number that the module multiplies rows of its weight with, 1 for most; found by asking it for a row of one 1.

    Its own dtype has no part in it: engines multiply by the number as it is written.
    """
    asked = copy.copy(embedding)
    asked.__dict__["_parameters"] = {"weight": nn.Parameter(torch.ones(1, 1), requires_grad=False)}
    asked.__dict__["_buffers"] = {name: buffer.cpu() for name, buffer in embedding.named_buffers(recurse=False)}
    asked.__dict__["padding_idx"] = None
    return float(asked(torch.zeros(1, dtype=torch.long)))
