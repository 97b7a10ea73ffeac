"""Drawing the target's tokens: greedy, or temperature, top-k and top-p with one uniform number a (seed, position).

Speculative decoding with proposals that are an argmax draws exactly the tokens of plain decoding: verification accepts
a proposal iff it equals the token drawn at its position. For a point mass that is the rejection rule of speculative
sampling; for proposals that were drawn from a q of their own, `verification.py` has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draftsmith.stages.drafters.drawing import argmax, pick, sampled, uniform
from draftsmith.stages.engines.base import SamplingParams


def draw(
    logits: torch.Tensor, positions: torch.Tensor, sampling: Sequence[SamplingParams], seeds: Sequence[int]
) -> torch.Tensor:
    """The target's tokens for several rows: logits [n, T, V]; positions [n, T] of the tokens drawn. Returns [n, T]."""
    tokens = argmax(logits)
    rows = [row for row, params in enumerate(sampling) if not params.greedy]
    at = positions.tolist() if rows else []
    for row in rows:
        p = sampled(logits[row], sampling[row].law)
        tokens[row] = pick(p, torch.tensor([uniform(seeds[row], each) for each in at[row]]).double())
    return tokens
