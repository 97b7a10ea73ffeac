"""Drawing the target's tokens: greedy, or temperature and top-p with one uniform number a (seed, position).

Speculative decoding with proposals that are an argmax draws exactly the tokens of plain decoding: verification accepts
a proposal iff it equals the token drawn at its position. For a point mass that is the rejection rule of speculative
sampling; for proposals that were drawn from a q of their own, `verification.py` has it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draftsmith.stages.drafters.drawing import argmax, pick, probabilities, uniform
from draftsmith.stages.engines.base import SamplingParams


def draw(
    logits: torch.Tensor, positions: torch.Tensor, sampling: Sequence[SamplingParams], seeds: Sequence[int]
) -> torch.Tensor:
    """The target's tokens for several rows: logits [n, T, V]; positions [n, T] of the tokens drawn. Returns [n, T]."""
    tokens = argmax(logits)
    sampled = [row for row, params in enumerate(sampling) if not params.greedy]
    at = positions.tolist() if sampled else []
    for row in sampled:
        p = probabilities(logits[row], sampling[row].temperature, sampling[row].top_p)
        tokens[row] = pick(p, torch.tensor([uniform(seeds[row], each) for each in at[row]]).double())
    return tokens
