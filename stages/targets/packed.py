"""Weights in the order in which oneDNN's kernels read them: decoding on a CPU is bound by reading them.

A plain linear map in bfloat16 has its weight put into that order at every call; a frozen one can be once. The product
is the same bit for bit; with a bias it is rounded once instead of twice. The operators are those that torch's own
compiler calls for frozen weights.
"""

from __future__ import annotations

import torch
from torch import nn


class PackedLinear(nn.Module):
    """A frozen linear map, bfloat16 on the CPU. No gradient."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        """weight: [out_features, in_features]; bias: [out_features]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """[out_features, in_features], a copy: for models that read a map's weight themselves."""
        return self.packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.bfloat16).contiguous()  # in another dtype under autocast; other strides are not looked at
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return product


def can_pack(weight: torch.Tensor) -> bool:
    """Whether this processor multiplies in bfloat16, and this torch has the operators."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack(model: nn.Module) -> None:
    """Replace the linear maps of a frozen model where they can be packed. One weight after the other is replaced: it
    takes no more memory than the largest."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(module, name, PackedLinear(child.weight, child.bias))
