"""Losses of one position each: pure functions of log-probs or logits. Formulas: Draft-OPD, arXiv 2605.29343, section 3.

p is the target, q the drafter. All inputs are float32 and all outputs have one value a position; tests hold each
against a plain reference.
"""

from __future__ import annotations

import torch

LOG_FLOOR = -10.0  # log-probs are floored here
TERM_LIMIT = 10.0  # and the terms of the paper's pair clamped to ± this


def cross_entropy(logits_q: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """-log q(token). logits_q [N, V], column [N] → [N]. The greedy rule: only the target's argmax matters."""
    return logits_q.logsumexp(-1) - logits_q.gather(-1, column[:, None])[:, 0]


def forward_kl(logits_q: torch.Tensor, logits_p: torch.Tensor) -> torch.Tensor:
    """KL(p || q) over the vocabulary, logits [N, V] each → [N]. The sampled rule: q should be large where p is."""
    log_p = torch.log_softmax(logits_p, -1)
    return (log_p.exp() * (log_p - torch.log_softmax(logits_q, -1))).sum(-1)


def bernoulli_forward_kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """The response stream of the paper: KL between "this token or not" under p and q, from their log-probs [N].

    p·log(p/q) + (1-p)·log((1-p)/(1-q)), log-probs floored, the term clamped.
    """
    log_p, log_q = log_p.clamp(min=LOG_FLOOR), log_q.clamp(min=LOG_FLOOR)
    p = log_p.exp()
    not_p, not_q = (_log_complement(x) for x in (log_p, log_q))
    term = p * (log_p - log_q) + (1 - p) * (not_p - not_q)
    return term.clamp(-TERM_LIMIT, TERM_LIMIT)


def k3_reverse_kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """The rejected stream of the paper: exp(Δ) - Δ - 1 with Δ = log p - log q of the drafter's own proposal, [N].

    An unbiased, non-negative estimate of KL(q || p) at samples of q (Schulman, "Approximating KL divergence", k3).
    """
    delta = log_p.clamp(min=LOG_FLOOR) - log_q.clamp(min=LOG_FLOOR)
    return (delta.exp() - delta - 1).clamp(-TERM_LIMIT, TERM_LIMIT)


def _log_complement(log_x: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(log_x)), floored like every log-prob."""
    return torch.log((-torch.expm1(log_x)).clamp(min=torch.finfo(log_x.dtype).tiny)).clamp(min=LOG_FLOOR)


def decay_weights(offsets: torch.Tensor, gamma: float) -> torch.Tensor:
    """exp(-(k-1)/γ): DFlash's weights of offsets k = 1, 2, … (arXiv 2602.06036)."""
    return torch.exp(-(offsets.float() - 1) / gamma)


def power_weights(offsets: torch.Tensor, delta: float) -> torch.Tensor:
    """δ^(k-1): the paper's weights of the rejected stream."""
    return delta ** (offsets.float() - 1)
