"""Losses behind a large head, with memory for the logits of one chunk of positions only.

A position's loss depends on its own hidden state alone. Behind a frozen head, each chunk's gradient with respect to its
hidden states is taken at once and the logits are freed; backward then only scales the stored gradient [N, H], row by
row: no logits are computed twice. A head that is trained with the drafter needs its gradient too, which depends on the
weights that a caller gives the values later: its logits are computed again in backward, chunk by chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from draftsmith.stages.runtime.memory import out_of_memory, release_memory

Values = Callable[[torch.Tensor, slice], torch.Tensor]


class _StoredGradient(torch.autograd.Function):
    """Values [N] whose gradient with respect to `hidden` [N, H] is known already, row by row."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, values: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        ctx.save_for_backward(gradient)
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype)[:, None], None, None


def slices(count: int, size: int) -> list[slice]:
    """Of `count` positions, at most `size` each."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def chunked_values(
    hidden: torch.Tensor, positions_per_chunk: int, values_of: Values, *, trained_head: bool = False
) -> torch.Tensor:
    """`values_of(hidden[part], part)` [n] chunk by chunk → float32 [N].

    Differentiable in `hidden` [N, H], and with `trained_head` in all that `values_of` reads, which is then called again
    in backward. Value i must not depend on another row of `hidden`: weigh and sum the result outside. That is why a
    chunk that the memory does not hold is computed once more in two halves (behind a frozen head).
    """
    parts = slices(hidden.shape[0], positions_per_chunk)
    with_gradient = torch.is_grad_enabled()
    if with_gradient and trained_head:
        chunks = [checkpoint(values_of, hidden[part], part, use_reentrant=False) for part in parts]
        return torch.cat([hidden[:0].float().sum(-1), *chunks])  # part of the graph also without positions
    values = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
    gradient = torch.zeros_like(hidden) if with_gradient else None

    def compute(part: slice) -> None:
        if gradient is None:
            values[part] = values_of(hidden[part], part)
            return
        leaf = hidden[part].detach().requires_grad_()
        of_chunk = values_of(leaf, part)
        (gradient[part],) = torch.autograd.grad(of_chunk.sum(), leaf)
        values[part] = of_chunk.detach()

    for part in parts:
        try:
            compute(part)
            continue
        except Exception as error:
            if not out_of_memory(error) or part.stop - part.start < 2:
                raise
        release_memory()  # not above: the error's frames hold what is to be given back
        middle = (part.start + part.stop) // 2
        compute(slice(part.start, middle))
        compute(slice(middle, part.stop))
    return values if gradient is None else _StoredGradient.apply(hidden, values, gradient)
