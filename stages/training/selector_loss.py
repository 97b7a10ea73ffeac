"""Losses of a drafter that selects among the head's candidates by the token before each offset.

Beside the loss of its head, which keeps the right token among the candidates, stands the same loss of its distribution
q, the softmax over the candidates. In the loss alone, a right token that is missing takes the last candidate's place,
so that it can be learned. The target's distribution over the candidates is that over all tokens of the head: where the
rest of its mass lies, nothing can be proposed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.training import losses
from draftsmith.stages.training.blocks import LossContext
from draftsmith.stages.training.chunked_loss import chunked_values, slices
from draftsmith.stages.training.target_signal import TargetSignal


@dataclass(frozen=True)
class PositionLosses:
    """The drafter's losses at N positions."""

    terms: torch.Tensor  # [N] differentiable
    correct: torch.Tensor  # bool [N]: the drafter would propose the committed token
    log_q: torch.Tensor  # [N] of the committed token, without gradient; -inf where it cannot be proposed


def _rejected(logits: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Return the probability [n] that a sampled proposal is rejected: half of the L1 distance over all tokens."""
    return 1 - torch.minimum(log_p.exp(), logits.softmax(-1)).sum(-1)


@dataclass(frozen=True)
class _Candidates:
    """The k candidates at N positions, the committed token always one of them."""

    columns: torch.Tensor  # [N, k] in the head
    index: torch.Tensor  # [N] of the committed token among them
    present: torch.Tensor  # bool [N]: the drafter itself has it among its candidates


@torch.no_grad()
def _candidates(drafter: Drafter, hidden: torch.Tensor, columns: torch.Tensor, context: LossContext) -> _Candidates:
    """Find the candidates at hidden states [N, H]. columns: [N] of the committed tokens in the head."""
    among = drafter.selector_candidates(hidden, context.heads.drafter)
    present = (among == columns[:, None]).any(-1)
    among = torch.cat([among[:, :-1], torch.where(present, among[:, -1], columns)[:, None]], -1)
    return _Candidates(among, (among == columns[:, None]).long().argmax(-1), present)


def selector_loss(hidden: torch.Tensor, previous: torch.Tensor, signal: TargetSignal, loss: str) -> PositionLosses:
    """Compute the loss of the selector's choice at N positions.

    hidden: [N, H] of the drafter. previous: [N] tokens before these positions. loss: a resolved name.
    """
    context = signal.context
    drafter, head, size = context.heads.selector, context.heads.drafter, context.positions_per_chunk
    assert drafter is not None
    # of the target's log-probs of the candidates, which need not sum to 1; `forward_kl` normalises them
    distribution = losses.imported(loss) if ":" in loss else losses.DISTRIBUTION_LOSSES.get(loss)
    candidates = _candidates(drafter, hidden, signal.columns, context)
    among, index, present = candidates.columns, candidates.index, candidates.present
    log_p = torch.zeros(among.shape, device=among.device)  # computed once: backward calls `values` again
    for chunk in slices(len(among) if distribution is not None or loss == "ce_l1" else 0, size):
        log_p[chunk] = torch.log_softmax(signal.at(chunk).logits(), -1).gather(-1, among[chunk])
    correct, log_q = torch.zeros_like(present), torch.full_like(index, -torch.inf, dtype=torch.float32)

    def values(h: torch.Tensor, chunk: slice) -> torch.Tensor:
        logits = drafter.selector_logits(h, previous[chunk], among[chunk], head)
        at, inside = index[chunk], present[chunk]
        of_token = losses.cross_entropy(losses.at_temperature(logits, context.proposal_temperature), at)
        with torch.no_grad():
            correct[chunk] = inside & (logits.argmax(-1) == at)
            log_q[chunk] = torch.where(inside, -of_token, -torch.inf)
        if loss == "cross_entropy":
            return of_token
        if loss == "bernoulli_kl":
            return losses.bernoulli_forward_kl(-losses.cross_entropy(logits, at), signal.token_logprob[chunk])
        if loss == "ce_l1":
            return 0.1 * of_token + 0.9 * 2 * _rejected(logits, log_p[chunk])
        assert distribution is not None
        return distribution(logits, log_p[chunk])

    terms = chunked_values(hidden, size, values, trained_head=True)
    return PositionLosses(terms, correct, log_q)


def selector_logprobs(
    hidden: torch.Tensor, previous: torch.Tensor, columns: torch.Tensor, context: LossContext
) -> torch.Tensor:
    """Return the selector's log q [N] of tokens, differentiable.

    hidden: [N, H]. previous: [N] tokens before these positions. columns: [N] of the tokens in the head.
    """
    drafter, head = context.heads.selector, context.heads.drafter
    assert drafter is not None
    candidates = _candidates(drafter, hidden, columns, context)

    def values(h: torch.Tensor, chunk: slice) -> torch.Tensor:
        logits = drafter.selector_logits(h, previous[chunk], candidates.columns[chunk], head)
        return -losses.cross_entropy(logits, candidates.index[chunk])

    return chunked_values(hidden, context.positions_per_chunk, values, trained_head=True)
