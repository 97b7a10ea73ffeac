"""Losses of single positions, weights of a block's positions, and losses over a large head in chunks.

The first two are pure functions of log-probs or logits. p is the target, q the drafter. All inputs are float32 and all
outputs have one value per position; tests compare each with a plain reference. Sources: Draft-OPD (arXiv 2605.29343,
section 3) for the paper's pair, DSpark (arXiv 2607.05147) for its pair and for confidence, DFlash (arXiv 2602.06036)
and D-PACE (arXiv 2605.18810) for weights.

`chunked_values` holds the logits of one chunk of positions in memory. A position's loss depends only on its own hidden
state. With a frozen head, each chunk's gradient with respect to its hidden states is taken immediately and the logits
are freed; backward then only scales the stored gradient [N, H], row by row: no logits are computed twice. A head that
is trained with the drafter needs a gradient too. It depends on the weights that a caller later gives the values, so its
logits are computed again in backward, chunk by chunk.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.memory import out_of_memory, release_memory

LOG_FLOOR = -10.0  # log-probs are floored here
TERM_LIMIT = 10.0  # and the terms of the paper's pair clamped to ± this
NOTHING = -1e9  # a logit whose probability is exactly 0, and finite, so that 0 · log 0 is 0


def cross_entropy(logits_q: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
    """Return -log q(token). logits_q [N, V], column [N] → [N]. The greedy rule: only the target's argmax matters."""
    if torch.compiler.is_compiling():  # it rounds differently, and needs no second write for the gradient of `gather`
        return functional.cross_entropy(logits_q, column, reduction="none")
    return logits_q.logsumexp(-1) - logits_q.gather(-1, column[:, None])[:, 0]


def forward_kl(logits_q: torch.Tensor, logits_p: torch.Tensor) -> torch.Tensor:
    """Return KL(p || q) over the vocabulary, logits [N, V] → [N]. The sampled rule: q should be large where p is."""
    log_p = torch.log_softmax(logits_p, -1)
    return (log_p.exp() * (log_p - torch.log_softmax(logits_q, -1))).sum(-1)


def total_variation(logits_q: torch.Tensor, logits_p: torch.Tensor) -> torch.Tensor:
    """Return ½ Σ |p - q|, logits [N, V] each → [N]: the probability that a proposal sampled from q is rejected."""
    return 0.5 * (logits_p.softmax(-1) - logits_q.softmax(-1)).abs().sum(-1)


def imported(name: str) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Import the loss that `MODULE:FUNCTION` names: a function of q's logits and p's log-probs, [N, V] each → [N].

    V: all tokens of the head, or the candidates of a drafter with a selector, over which p need not sum to 1.
    """
    module, _, function = name.partition(":")
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None
    loss = getattr(importlib.import_module(module), function, None)
    if loss is None:
        raise DraftsmithError(f"{module} has no function {function}. Correct the loss {name} in the config.")
    return loss


def ce_l1(cross_entropies: torch.Tensor, rejected: torch.Tensor) -> torch.Tensor:
    """Return DSpark's 0.1 · cross-entropy + 0.9 · Σ |p - q| (arXiv 2607.05147).

    cross_entropies: [N]. rejected: [N] probabilities that a proposal is rejected: half of Σ |p - q|.
    """
    return 0.1 * cross_entropies + 0.9 * 2 * rejected


@torch.no_grad()
def acceptance(logits_q: torch.Tensor, logits_p: torch.Tensor) -> torch.Tensor:
    """Return Σ min(p, q): the probability [N] that a proposal sampled from q is accepted."""
    return (1 - total_variation(logits_q, logits_p)).clamp(0, 1)


def at_temperature(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the logits [N, V] of the distribution at a temperature; 0 puts all mass on the argmax."""
    if temperature > 0:
        return logits if temperature == 1 else logits / temperature
    return torch.full_like(logits, NOTHING).scatter_(-1, logits.argmax(-1, keepdim=True), 0.0)


def bernoulli_forward_kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Return the paper's response loss: KL between "this token or not" under p and q, from their log-probs [N].

    p·log(p/q) + (1-p)·log((1-p)/(1-q)), with floored log-probs and a clamped result.
    """
    log_p, log_q = log_p.clamp(min=LOG_FLOOR), log_q.clamp(min=LOG_FLOOR)
    p = log_p.exp()
    not_p, not_q = (_log_complement(x) for x in (log_p, log_q))
    term = p * (log_p - log_q) + (1 - p) * (not_p - not_q)
    return term.clamp(-TERM_LIMIT, TERM_LIMIT)


def k3_reverse_kl(log_q: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    """Return the paper's rejected loss: exp(Δ) - Δ - 1 with Δ = log p - log q of the drafter's own proposal, [N].

    A non-negative estimate of KL(q || p) (Schulman, "Approximating KL divergence", k3), unbiased where proposals are
    sampled from q; argmaxes, as in the paper, bias it. Log-probs are floored, which the authors' code does not do.
    """
    delta = log_p.clamp(min=LOG_FLOOR) - log_q.clamp(min=LOG_FLOOR)
    return (delta.exp() - delta - 1).clamp(-TERM_LIMIT, TERM_LIMIT)


def _log_complement(log_x: torch.Tensor) -> torch.Tensor:
    """Return log(1 - exp(log_x)), floored like every log-prob."""
    return torch.log((-torch.expm1(log_x)).clamp(min=torch.finfo(log_x.dtype).tiny)).clamp(min=LOG_FLOOR)


def decay_weights(offsets: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return exp(-(k-1)/γ): DFlash's weights of offsets k = 1, 2, … (arXiv 2602.06036)."""
    return torch.exp(-(offsets.float() - 1) / gamma)


def power_weights(offsets: torch.Tensor, delta: float) -> torch.Tensor:
    """Return δ^(k-1): the paper's weights of the rejected stream."""
    return delta ** (offsets.float() - 1)


def d_pace_weights(
    log_q: torch.Tensor, inside: torch.Tensor, alpha: float = 0.5, absent: torch.Tensor | None = None
) -> torch.Tensor:
    """Return D-PACE's weights [..., K] (arXiv 2605.18810): the gain in expected accepted length from offset k on.

    That is Σ_{i≥k} Π_{j≤i} q̃_j, where q̃ = (1 - α) q + α is the drafter's smoothed confidence in the committed token,
    without gradient; the authors take an α of 0.5. log_q: [..., K] of these tokens. inside: bool [..., K], the offsets
    that count. absent: bool [..., K], offsets whose token cannot be proposed: no weight and a q of 0.
    """
    counted = inside if absent is None else inside | absent
    smoothed = torch.where(inside, (1 - alpha) * log_q.exp() + alpha, 1.0)
    if absent is not None:
        smoothed = smoothed.masked_fill(absent, alpha)
    reached = smoothed.cumprod(-1) * counted
    return reached.flip(-1).cumsum(-1).flip(-1) * inside


Values = Callable[[torch.Tensor, slice], torch.Tensor]


class _StoredGradient(torch.autograd.Function):
    """Values [N] whose gradient with respect to `hidden` [N, H] is already known, row by row."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, values: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype)[:, None], None, None


def slices(count: int, size: int) -> list[slice]:
    """Split `count` positions into chunks of at most `size`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def chunked_values(
    hidden: torch.Tensor, positions_per_chunk: int, values_of: Values, *, trained_head: bool = False
) -> torch.Tensor:
    """Compute `values_of(hidden[chunk], chunk)` [n] chunk by chunk → float32 [N].

    The result is differentiable in `hidden` [N, H], and with `trained_head` in all tensors that `values_of` reads; it
    is then called again in backward. Value i must not depend on another row of `hidden`: weight and sum the result
    outside. So with a frozen head, a chunk that does not fit into memory can be computed again in two halves.
    """
    chunks = slices(hidden.shape[0], positions_per_chunk)
    with_gradient = torch.is_grad_enabled()
    if with_gradient and trained_head:
        values_of_chunks = [checkpoint(values_of, hidden[chunk], chunk, use_reentrant=False) for chunk in chunks]
        return torch.cat([hidden[:0].float().sum(-1), *values_of_chunks])  # in the graph even without positions
    values = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
    gradient = torch.zeros_like(hidden) if with_gradient else None

    def compute(chunk: slice) -> None:
        if gradient is None:
            values[chunk] = values_of(hidden[chunk], chunk)
            return
        leaf = hidden[chunk].detach().requires_grad_()
        chunk_values = values_of(leaf, chunk)
        (gradient[chunk],) = torch.autograd.grad(chunk_values.sum(), leaf)
        values[chunk] = chunk_values.detach()

    for chunk in chunks:
        try:
            compute(chunk)
            continue
        except Exception as error:
            if not out_of_memory(error) or chunk.stop - chunk.start < 2:
                raise
        release_memory()  # outside `except`: the error's frames still hold the memory
        middle = (chunk.start + chunk.stop) // 2
        compute(slice(chunk.start, middle))
        compute(slice(middle, chunk.stop))
    return values if gradient is None else _StoredGradient.apply(hidden, values, gradient)
