"""A loss behind a large frozen head, with memory for the logits of one chunk of positions only.

The head has no gradient of its own, so each chunk's gradient with respect to its hidden states is taken at once and the
logits are freed; backward then only scales the stored gradient [N, H]. No logits are computed twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class _StoredGradient(torch.autograd.Function):
    """A value whose gradient with respect to `hidden` is known already."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:  # noqa: ARG004
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (gradient,) = ctx.saved_tensors
        return gradient * grad_outputs[0].to(gradient.dtype), None, None


def chunked_sum(
    hidden: torch.Tensor, positions_per_chunk: int, value_of: Callable[[torch.Tensor, slice], torch.Tensor]
) -> torch.Tensor:
    """Sum of `value_of(hidden[part], part)` over chunks of positions; differentiable in `hidden` [N, H] only."""
    total = hidden.new_zeros((), dtype=torch.float32)
    gradient = torch.zeros_like(hidden)
    for start in range(0, hidden.shape[0], positions_per_chunk):
        part = slice(start, min(start + positions_per_chunk, hidden.shape[0]))
        if not torch.is_grad_enabled():
            total += value_of(hidden[part], part)
            continue
        leaf = hidden[part].detach().requires_grad_()
        value = value_of(leaf, part)
        (gradient[part],) = torch.autograd.grad(value, leaf)
        total += value.detach()
    return _StoredGradient.apply(hidden, total, gradient) if torch.is_grad_enabled() else total
