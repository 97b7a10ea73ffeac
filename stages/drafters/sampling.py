"""Sampling of tokens: temperature, top-k and top-p, with uniform numbers by (seed, position).

The numbers depend on nothing else, so a request samples the same tokens in any batch. A position has an independent
number for each purpose; which of them decides its token is known before the number is read.
"""

from __future__ import annotations

import hashlib
import math
from enum import IntEnum

import numpy as np
import torch

from draftsmith.stages.targets.sampling import SamplingParams

_SLICE, _SMALLEST_SLICE = 512, 32  # scores; powers of two that divide the size of a vocabulary


class Purpose(IntEnum):
    """The purposes of a position's numbers."""

    TARGET = 0  # the token is sampled from the target: without a drafter, or after a block that was accepted whole
    ACCEPT = 1  # is the proposal accepted?
    PROPOSAL = 2  # the proposal is sampled from the drafter's q
    RESIDUAL = 3  # the token after a rejection is sampled from max(p - q, 0)


def uniforms(seed: int, position: int) -> np.ndarray:
    """Return [purposes] numbers in [0, 1) from the counter-based generator Philox, keyed by seed and position."""
    key = np.array([seed & (2**64 - 1), position], dtype=np.uint64)
    numbers: np.ndarray = np.random.Generator(np.random.Philox(key=key)).random(len(Purpose))
    return numbers


def uniform(seed: int, position: int, purpose: Purpose = Purpose.TARGET) -> float:
    """Return the number for one purpose."""
    return float(uniforms(seed, position)[purpose])


def seed_from_name(name: str, salt: int = 0) -> int:
    """Derive a 64-bit seed from a unique name; another salt gives another seed."""
    return int.from_bytes(hashlib.sha256(f"{salt}/{name}".encode()).digest()[:8], "big")


def argmax(scores: torch.Tensor) -> torch.Tensor:
    """Return `scores.argmax(-1)`, the first of equal ones.

    On the CPU it takes the maxima of slices first: torch's kernels for them are several times faster over a vocabulary.
    """
    size = math.gcd(scores.shape[-1], _SLICE)
    if scores.device.type != "cpu" or size < _SMALLEST_SLICE:
        return scores.argmax(-1)
    slices = scores.unflatten(-1, (-1, size))
    best = slices.amax(-1).argmax(-1, keepdim=True)
    within = slices.gather(-2, best[..., None].expand(*best.shape, size))[..., 0, :].argmax(-1)
    return best[..., 0] * size + within


def probabilities(logits: torch.Tensor, temperature: float | torch.Tensor) -> torch.Tensor:
    """Return the distribution of float32 logits [..., V], float64 [..., V]. temperature: above 0."""
    return torch.softmax(logits.double() / temperature, -1)


def probability_of(logits: torch.Tensor, columns: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return float64 [...]: `probabilities` of float32 logits [..., V] at columns [...], to the precision of float32.

    It allocates no distribution in float64.
    """
    relative = (logits - logits.amax(-1, keepdim=True)) / temperature
    weight = relative.gather(-1, columns[..., None])[..., 0].double().exp()
    return weight / relative.exp_().sum(-1).double()


def probability_among(
    scores: torch.Tensor, candidates: torch.Tensor, tokens: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Return float64 [...]: the probability of tokens [...] sampled from candidates [..., k] by their scores.

    It is 0 for tokens that are no candidates.
    """
    return (probabilities(scores, temperature) * (candidates == tokens[..., None])).sum(-1)


def sampling_distribution(logits: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Return the distribution that is sampled from, float64 [..., V], for float32 logits [..., V].

    sampling: not greedy.
    """
    return truncate(probabilities(logits, sampling.temperature), sampling)


def truncate(p: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Apply top-k, then top-p to a distribution [..., V], and normalise it.

    top-k keeps all tokens that are as likely as the k-th: more than k where they tie there. top-p keeps the smallest
    set of most likely tokens whose probability reaches it, among those that top-k keeps.
    """
    if sampling.top_k:
        p = _without(p, _after_top_k(p, sampling.top_k))
    return _without(p, _after_top_p(p, sampling.top_p)) if sampling.top_p < 1 else p


def truncation_mask(p: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Return bool [..., V]: the tokens of a distribution [..., V] that top-k and top-p exclude.

    sampling: has a top-k or a top-p below 1.
    """
    if not sampling.top_k:
        return _after_top_p(p, sampling.top_p)
    after_top_k = _after_top_k(p, sampling.top_k)
    if sampling.top_p == 1:
        return after_top_k
    p = _without(p, after_top_k)  # frees the whole distribution: sorting takes much memory already
    return after_top_k | _after_top_p(p, sampling.top_p)


def is_truncated(p: torch.Tensor, tokens: torch.Tensor, sampling: SamplingParams) -> torch.Tensor:
    """Return bool [...]: whether top-k and top-p exclude tokens [...] from distributions [..., V].

    The vocabulary is not sorted: of equally likely tokens, top-p excludes none or all.
    """
    if sampling.top_k:
        p = _without(p, _after_top_k(p, sampling.top_k))
    p_token = p.gather(-1, tokens[..., None])
    return (p_token[..., 0] == 0) | ((p * (p > p_token)).sum(-1) >= sampling.top_p if sampling.top_p < 1 else False)


def _without(p: torch.Tensor, dropped: torch.Tensor) -> torch.Tensor:
    p = p.masked_fill(dropped, 0.0)
    return p / p.sum(-1, keepdim=True)


def _after_top_k(p: torch.Tensor, top_k: int) -> torch.Tensor:
    return p < p.topk(min(top_k, p.shape[-1])).values[..., -1:]


def _after_top_p(p: torch.Tensor, top_p: float) -> torch.Tensor:
    ordered, order = p.sort(-1, descending=True)
    dropped = ordered.cumsum(-1) - ordered >= top_p  # the mass before this token already suffices
    return torch.zeros_like(dropped).scatter(-1, order, dropped)


def sample_inverse_cdf(weights: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """Return indices [...] sampled in proportion to `weights` [..., V], by uniform numbers [...]."""
    cumulative = weights.cumsum(-1)
    sought = numbers.to(weights)[..., None] * cumulative[..., -1:]
    index = torch.searchsorted(cumulative, sought, right=True).squeeze(-1)
    return index.clamp(max=weights.shape[-1] - 1)


def scatter_to_vocab(weights: torch.Tensor, token_ids: torch.Tensor | None, vocabulary: int) -> torch.Tensor:
    """Spread the weights [..., V'] of these tokens over the vocabulary [..., V], 0 for the others."""
    if token_ids is None:
        return weights
    whole = weights.new_zeros(*weights.shape[:-1], vocabulary)
    whole[..., token_ids] = weights
    return whole
