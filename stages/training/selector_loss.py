"""Losses of a drafter that chooses among the head's candidates by the token before each offset.

Beside the loss of its head, which keeps the right token among the candidates, stands the same loss of its distribution
q, the softmax over the candidates. A right token that is missing takes the last candidate's place in the loss alone, so
that it can be learned. What the target says of the candidates is its distribution over all tokens of the head: the rest
of its mass is where nothing can be proposed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.training import losses
from draftsmith.stages.training.chunked_loss import chunked_values, slices


def _rejected(logits: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """[n] the probability that what is drawn is rejected, which is half of what all tokens differ by."""
    return 1 - torch.minimum(log_p.exp(), logits.softmax(-1)).sum(-1)


# of q's logits [n, k], the token's -log q at the temperature that it was drawn at [n], and the target's log-probs of
# the candidates [n, k]
_DISTRIBUTION_LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    # of the distribution given that a candidate is committed
    "forward_kl": lambda logits, _token, log_p: losses.forward_kl(logits, log_p),
    "ce_l1": lambda logits, token, log_p: 0.1 * token + 0.9 * 2 * _rejected(logits, log_p),
}


@dataclass(frozen=True)
class Chosen:
    """The choice at N positions."""

    terms: torch.Tensor  # [N] losses, differentiable
    correct: torch.Tensor  # bool [N]: the token is what would be chosen
    log_q: torch.Tensor  # [N] of the token, without gradient; -inf where it is no candidate


def chosen(
    drafter: Drafter,
    hidden: torch.Tensor,
    previous: torch.Tensor,
    columns: torch.Tensor,
    head: Head,
    loss: str,
    positions_per_chunk: int,
    *,
    temperature: float = 1.0,
    token_logprob: torch.Tensor | None = None,
    target_logits: Callable[[slice], torch.Tensor] | None = None,
) -> Chosen:
    """hidden: [N, H]; previous: [N] tokens before these positions; columns: [N] of the committed tokens in the head.

    temperature: that the tokens were drawn at. token_logprob: log p [N] of the committed tokens, which Bernoulli's KL
    reads. target_logits: of a chunk [n, V'] over the head's tokens, for the losses of distributions.
    """
    named = losses.imported(loss) if ":" in loss else None
    with torch.no_grad():
        among = drafter.selector_candidates(hidden, head)
        present = (among == columns[:, None]).any(-1)
        among = torch.cat([among[:, :-1], torch.where(present, among[:, -1], columns)[:, None]], -1)
        place = (among == columns[:, None]).long().argmax(-1)
        log_p = torch.zeros(among.shape, device=among.device)  # the target's, once: backward calls `values` again
        for part in slices(len(among) if named or loss in _DISTRIBUTION_LOSSES else 0, positions_per_chunk):
            assert target_logits is not None
            log_p[part] = torch.log_softmax(target_logits(part), -1).gather(-1, among[part])
    correct, log_q = torch.zeros_like(present), torch.full_like(place, -torch.inf, dtype=torch.float32)

    def values(h: torch.Tensor, part: slice) -> torch.Tensor:
        logits, at, inside = drafter.selector_logits(h, previous[part], among[part], head), place[part], present[part]
        of_token = losses.cross_entropy(losses.at_temperature(logits, temperature), at)
        with torch.no_grad():
            correct[part] = inside & (logits.argmax(-1) == at)
            log_q[part] = torch.where(inside, -of_token, -torch.inf)
        if loss == "cross_entropy":
            return of_token
        if loss == "bernoulli_kl":
            assert token_logprob is not None
            return losses.bernoulli_forward_kl(-losses.cross_entropy(logits, at), token_logprob[part])
        if named is not None:
            return named(logits, log_p[part])
        return _DISTRIBUTION_LOSSES[loss](logits, of_token, log_p[part])

    terms = chunked_values(hidden, positions_per_chunk, values, trained_head=True)
    return Chosen(terms, correct, log_q)


def choice_logprobs(
    drafter: Drafter,
    hidden: torch.Tensor,
    previous: torch.Tensor,
    columns: torch.Tensor,
    head: Head,
    positions_per_chunk: int,
) -> torch.Tensor:
    """[N] log q of tokens, arguments as of `chosen`; differentiable."""
    found = chosen(drafter, hidden, previous, columns, head, "cross_entropy", positions_per_chunk)
    return -found.terms
