"""Drawing the target's tokens: greedy, or temperature and top-p with one uniform number a (seed, position).

The number depends on nothing else, so a request draws the same tokens in any batch, and speculative decoding draws
exactly the tokens of plain decoding: verification accepts a proposal iff it equals the token drawn at its position.
For a drafter that proposes its argmax (a point mass) this is the rejection rule of speculative sampling.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from draftsmith.stages.engines.base import SamplingParams


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from the counter-based generator Philox, keyed by seed and position."""
    key = np.array([seed & (2**64 - 1), position], dtype=np.uint64)
    return float(np.random.Generator(np.random.Philox(key=key)).random())


def probabilities(logits: torch.Tensor, temperature: float, top_p: float) -> torch.Tensor:
    """float32 logits [..., V] → the distribution that is sampled, float64 [..., V].

    top-p keeps the smallest set of most likely tokens whose probability reaches `top_p`.
    """
    p = torch.softmax(logits.double() / temperature, -1)
    if top_p < 1.0:
        ordered, order = p.sort(-1, descending=True)
        dropped = ordered.cumsum(-1) - ordered >= top_p  # the mass before this token already suffices
        p = p.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), 0.0)
        p = p / p.sum(-1, keepdim=True)
    return p


def draw(
    logits: torch.Tensor, positions: torch.Tensor, sampling: Sequence[SamplingParams], seeds: Sequence[int]
) -> torch.Tensor:
    """The target's tokens for several rows: logits [n, T, V]; positions [n, T] of the tokens drawn. Returns [n, T]."""
    tokens = logits.argmax(-1)
    for row, params in enumerate(sampling):
        if params.greedy:
            continue
        p = probabilities(logits[row], params.temperature, params.top_p)
        u = torch.tensor([[uniform(seeds[row], int(at))] for at in positions[row].tolist()], dtype=p.dtype)
        cumulative = p.cumsum(-1)
        index = torch.searchsorted(cumulative, u.to(p.device) * cumulative[:, -1:], right=True)
        tokens[row] = index.clamp(max=p.shape[-1] - 1).squeeze(-1)
    return tokens
