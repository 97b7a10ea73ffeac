"""Counts the operations of CPU kernels that torch's FLOP counter does not know: attention and packed weights."""

from __future__ import annotations

import math

import torch

_aten = torch.ops.aten


def _products(q: torch.Size, k: torch.Size, v: torch.Size, with_keys: int, with_values: int) -> int:
    """Count products of scores with keys and with values. Key heads may be fewer than those of queries."""
    return 2 * math.prod(q[:-1]) * k[-2] * (with_keys * q[-1] + with_values * v[-1])


def _of_forward(
    q: torch.Size, k: torch.Size, v: torch.Size, _dropout: float = 0.0, is_causal: bool = False, **_kwargs: object
) -> int:
    return _products(q, k, v, 1, 1) // (2 if is_causal else 1)  # kernels skip the half that causal attention masks


def _of_backward(
    _grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *_args: object, **_kwargs: object
) -> int:
    return _products(q, k, v, 3, 2)  # scores are computed again


def _of_packed(x: torch.Size, weight: torch.Size, *_args: object, **_kwargs: object) -> int:
    return 2 * math.prod(x) * weight[0]


# as FlopCounterMode takes them in `custom_mapping`
KERNEL_FLOPS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _of_forward,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _of_backward,
}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    KERNEL_FLOPS[torch.ops.mkldnn._linear_pointwise] = _of_packed
