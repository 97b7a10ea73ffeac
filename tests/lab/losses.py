"""Losses that only experiments use, named in a config as `tests.lab.losses:tv`.

Each is a function of the drafter's logits and of the target's log-probs of the same tokens, [N, V] each → [N].
"""

from __future__ import annotations

import torch


def tv(logits_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Return the total variation 1 - Σ min(p, q): the probability that a proposal sampled from q is rejected."""
    return 1 - torch.minimum(log_p.exp(), logits_q.softmax(-1)).sum(-1)


def lk(logits_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Return -log Σ min(p, q), minus the log of the acceptance probability (LK losses, arXiv 2602.23881, L_α).

    The slope of TV divided by the acceptance probability: it does not vanish where nearly everything is rejected.
    """
    return -torch.minimum(log_p, torch.log_softmax(logits_q, -1)).logsumexp(-1)
