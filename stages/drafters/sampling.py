"""Drawing tokens: temperature, top-k and top-p, with uniform numbers of a (seed, position).

The numbers depend on nothing else, so a request draws the same tokens in any batch. A position has one for each
purpose, independent of the others: which of them decides a position's token is decided before it is read.
"""

from __future__ import annotations

import hashlib
import math
from enum import IntEnum

import numpy as np
import torch

from draftsmith.stages.target.sampling import SamplingParams

_PART, _SMALLEST_PART = 512, 32  # scores of a part; powers of two that divide the size of a vocabulary


class Purpose(IntEnum):
    """What a position's numbers are for."""

    TARGET = 0  # the token is drawn from the target: plain decoding, and behind a block that was accepted whole
    ACCEPT = 1  # is the proposal kept?
    PROPOSAL = 2  # the proposal is drawn from the drafter's q
    RESIDUAL = 3  # the token behind a rejection is drawn from what q has too little of


def uniforms(seed: int, position: int) -> np.ndarray:
    """[purposes] numbers in [0, 1) from the counter-based generator Philox, keyed by seed and position."""
    key = np.array([seed & (2**64 - 1), position], dtype=np.uint64)
    numbers: np.ndarray = np.random.Generator(np.random.Philox(key=key)).random(len(Purpose))
    return numbers


def uniform(seed: int, position: int, purpose: Purpose = Purpose.TARGET) -> float:
    """One of them."""
    return float(uniforms(seed, position)[purpose])


def seed_from_name(name: str, salt: int = 0) -> int:
    """A seed (64 bits) for what has a name of its own."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{name}".encode()).digest()[:8], "big")


def argmax(scores: torch.Tensor) -> torch.Tensor:
    """`scores.argmax(-1)`, the first of equal ones. On the CPU by maxima of parts, for which torch has fast kernels, a
    multiple of them faster over a vocabulary."""
    part = math.gcd(scores.shape[-1], _PART)
    if scores.device.type != "cpu" or part < _SMALLEST_PART:
        return scores.argmax(-1)
    parts = scores.unflatten(-1, (-1, part))
    which = parts.amax(-1).argmax(-1, keepdim=True)
    within = parts.gather(-2, which[..., None].expand(*which.shape, part))[..., 0, :].argmax(-1)
    return which[..., 0] * part + within


def probabilities(logits: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """float32 logits [..., V] → their distribution, float64 [..., V]. temperature: above 0."""
    return torch.softmax(logits.double() / temperature, -1)


def probability_of(logits: torch.Tensor, columns: torch.Tensor, temperature: float) -> torch.Tensor:
    """float64 [...]: `probabilities` of float32 logits [..., V] at columns [...], to float32's precision: without a
    distribution in float64."""
    relative = (logits - logits.amax(-1, keepdim=True)) / temperature
    own = relative.gather(-1, columns[..., None])[..., 0].double().exp()
    return own / relative.exp_().sum(-1).double()


def probability_among(
    scores: torch.Tensor, candidates: torch.Tensor, tokens: torch.Tensor, temperature: float
) -> torch.Tensor:
    """float64 [...] of tokens [...] that are drawn among candidates [..., k] by their scores; 0 of what is none."""
    return (probabilities(scores, temperature) * (candidates == tokens[..., None])).sum(-1)


def sampling_distribution(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """float32 logits [..., V] → the distribution that is drawn from, float64 [..., V]. sampling: not greedy."""
    return truncate(probabilities(logits, sampling.temperature), sampling)


def truncate(p: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """What top-k, then top-p leave of a distribution [..., V], normalised.

    top-k keeps all tokens that are as likely as the k-th: more than k where they tie there. top-p keeps the smallest
    set of most likely tokens whose probability reaches it, among those that top-k keeps.
    """
    if sampling.top_k:
        p = _without(p, _behind(p, sampling.top_k))
    return _without(p, _late(p, sampling.top_p)) if sampling.top_p < 1 else p


def truncation_mask(p: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """bool [..., V], what these drop of a distribution [..., V]. sampling: one that leaves tokens out."""
    if not sampling.top_k:
        return _late(p, sampling.top_p)
    behind = _behind(p, sampling.top_k)
    if sampling.top_p == 1:
        return behind
    p = _without(p, behind)  # in the place of the whole one: sorting takes memory enough
    return behind | _late(p, sampling.top_p)


def is_truncated(p: torch.Tensor, tokens: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """bool [...], which of tokens [...] these drop of distributions [..., V]; without an order of the vocabulary, so of
    equally likely tokens top-p, too, drops none or all."""
    if sampling.top_k:
        p = _without(p, _behind(p, sampling.top_k))
    own = p.gather(-1, tokens[..., None])
    return (own[..., 0] == 0) | ((p * (p > own)).sum(-1) >= sampling.top_p if sampling.top_p < 1 else False)


def _without(p: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    p = p.masked_fill(dropped, 0.0)
    return p / p.sum(-1, keepdim=True)


def _behind(p: torch.Tensor, top_k: int) -> torch.Tensor:
    return p < p.topk(min(top_k, p.shape[-1])).values[..., -1:]


def _late(p: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered, order = p.sort(-1, descending=True)
    dropped = ordered.cumsum(-1) - ordered >= top_p  # the mass before this token already suffices
    return torch.zeros_like(dropped).scatter(-1, order, dropped)


def sample_inverse_cdf(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Indices [...] drawn in proportion to `weights` [..., V], by uniform numbers [...]."""
    cumulative = weights.cumsum(-1)
    sought = numbers.to(weights)[..., None] * cumulative[..., -1:]
    index = torch.searchsorted(cumulative, sought, right=True).squeeze(-1)
    return index.clamp(max=weights.shape[-1] - 1)


def scatter_to_vocab(weights: torch.Tensor, token_ids: torch.Tensor | None, vocabulary: int) -> torch.Tensor:
    """Weights [..., V'] of some tokens as weights of all [..., V], 0 for the others."""
    if token_ids is None:
        return weights
    whole = weights.new_zeros(*weights.shape[:-1], vocabulary)
    whole[..., token_ids] = weights
    return whole
