"""Blocks that are cut before verification, by the drafter's own confidence in its proposals.

Source: arXiv 2607.05147, and SGLang 0.5.20 (srt/speculative/dspark_components/dspark_planner.py). With c_j the
probability that proposal j is kept if those before it are, Π_{j≤k} c_j is that of k being reached and kept. A block is
cut in front of the first proposal for which it is below a threshold. What is said of a proposal depends on those before
it and on nothing else, so whether it is verified does not depend on what it is, nor on the target: what is committed
follows the target's law as before. SGLang takes the proposals of all running requests in the order of the same product,
as many as its table of step times makes worth it: a threshold too, but one that moves with the load.
"""

from __future__ import annotations

import torch


class KeptSoFar:
    """The probability that a block is kept so far, offset after offset."""

    def __init__(self, threshold: float):
        self._threshold = threshold
        self._kept: torch.Tensor | None = None

    def take(self, confidence: torch.Tensor) -> torch.Tensor:
        """Is the next offset verified, bool of any shape? confidence: logits of the same shape."""
        chance = confidence.float().sigmoid()
        self._kept = chance if self._kept is None else self._kept * chance
        return self._kept >= self._threshold


def verified(confidence: torch.Tensor, threshold: float) -> torch.Tensor:
    """How many proposals of each block are verified, [...]. confidence: logits [..., K]."""
    return (confidence.float().sigmoid().cumprod(-1) >= threshold).sum(-1)
