"""Losses over a large head, with memory for the logits of one chunk of positions only.

A position's loss depends on its own hidden state alone. With a frozen head, each chunk's gradient with respect to its
hidden states is taken immediately and the logits are freed; backward then only scales the stored gradient [N, H], row
by row: no logits are computed twice. A head that is trained with the drafter needs a gradient too, which depends on
the weights that a caller gives the values later: its logits are computed again in backward, chunk by chunk.
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
    """Split `count` positions into chunks of at most `size`."""
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def chunked_values(
    hidden: torch.Tensor, positions_per_chunk: int, values_of: Values, *, trained_head: bool = False
) -> torch.Tensor:
    """Compute `values_of(hidden[chunk], chunk)` [n] chunk by chunk → float32 [N].

    The result is differentiable in `hidden` [N, H], and with `trained_head` in all that `values_of` reads, which is
    then called again in backward. Value i must not depend on another row of `hidden`: weigh and sum the result outside.
    That is why, with a frozen head, a chunk that does not fit into memory can be computed again in two halves.
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
        of_chunk = values_of(leaf, chunk)
        (gradient[chunk],) = torch.autograd.grad(of_chunk.sum(), leaf)
        values[chunk] = of_chunk.detach()

    for chunk in chunks:
        try:
            compute(chunk)
            continue
        except Exception as error:
            if not out_of_memory(error) or chunk.stop - chunk.start < 2:
                raise
        release_memory()  # outside `except`: the error's frames hold the memory that is to be freed
        middle = (chunk.start + chunk.stop) // 2
        compute(slice(chunk.start, middle))
        compute(slice(middle, chunk.stop))
    return values if gradient is None else _StoredGradient.apply(hidden, values, gradient)
