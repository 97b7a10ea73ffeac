"""Losses behind a large frozen head, with memory for the logits of one chunk of positions only.

The head has no gradient of its own and a position's loss depends on its own hidden state alone. So each chunk's
gradient with respect to its hidden states is taken at once and the logits are freed; backward then only scales the
stored gradient [N, H], row by row. No logits are computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


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


def chunked_values(
    hidden: torch.Tensor, positions_per_chunk: int, values_of: Callable[[torch.Tensor, slice], torch.Tensor]
) -> torch.Tensor:
    """`values_of(hidden[part], part)` [n] chunk by chunk → float32 [N], differentiable in `hidden` [N, H] only.

    Value i must not depend on another row of `hidden`: weigh and sum the result outside.
    """
    values = hidden.new_zeros(hidden.shape[0], dtype=torch.float32)
    with_gradient = torch.is_grad_enabled()
    gradient = torch.zeros_like(hidden) if with_gradient else None
    for start in range(0, hidden.shape[0], positions_per_chunk):
        part = slice(start, min(start + positions_per_chunk, hidden.shape[0]))
        if gradient is None:
            values[part] = values_of(hidden[part], part)
            continue
        leaf = hidden[part].detach().requires_grad_()
        of_chunk = values_of(leaf, part)
        (gradient[part],) = torch.autograd.grad(of_chunk.sum(), leaf)
        values[part] = of_chunk.detach()
    return values if gradient is None else _StoredGradient.apply(hidden, values, gradient)
