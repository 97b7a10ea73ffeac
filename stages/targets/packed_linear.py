"""Linear maps with weights in the layout of oneDNN's kernels, since decoding on a CPU is bound by reading weights.

A plain linear map in bfloat16 reorders its weight at every call; a frozen one is reordered once. The product is the
same bit for bit; with a bias it is rounded once instead of twice. Torch's own compiler calls the same operators for
frozen weights. Maps of the same input are joined: one call reads more at a time.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)

Names = tuple[str, ...]

# Maps of a decoder's modules with the same input, in this order.
SAME_INPUT: tuple[Names, ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class PackedLinear(nn.Module):
    """A frozen linear map, bfloat16 on the CPU. No gradient."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        """Pack a weight [out_features, in_features]. bias: [out_features]."""
        super().__init__()
        self.out_features, self.in_features = weight.shape
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), None)
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

    @property
    def weight(self) -> torch.Tensor:
        """Return a copy [out_features, in_features], for models that read a map's weight themselves."""
        return self.packed.to_dense()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.to(torch.bfloat16).contiguous()  # another dtype under autocast; the operator ignores strides
        product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")
        return product


class PackedGroup(PackedLinear):
    """Maps of one input, stacked. The slices take their rows one after the other from one product."""

    _product: tuple[torch.Tensor, torch.Tensor] | None = None  # the input, and its product

    def rows(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """Return [..., start:stop] of the product, which is kept until its last rows are taken."""
        last = self._product
        product = last[1] if last is not None and last[0] is x else self(x)
        self._product = None if stop == self.out_features else (x, product)
        return product[..., start:stop]


class PackedSlice(nn.Module):
    """One map of a group, in place of a model's own."""

    def __init__(self, whole: PackedGroup, start: int, stop: int):
        super().__init__()
        self.whole, self.start, self.stop = whole, start, stop
        self.in_features, self.out_features = whole.in_features, stop - start

    @property
    def weight(self) -> torch.Tensor:
        return self.whole.weight[self.start : self.stop]

    @property
    def bias(self) -> torch.Tensor | None:
        return None if self.whole.bias is None else self.whole.bias[self.start : self.stop]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.whole.rows(x, self.start, self.stop)


def can_pack(weight: torch.Tensor) -> bool:
    """Return whether this processor multiplies in bfloat16, and this torch has the operators."""
    return (
        weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def pack(model: nn.Module, together: tuple[Names, ...] = SAME_INPUT) -> None:
    """Replace the linear maps of a frozen model by packed ones where possible, one at a time to save memory.

    together: names of a module's maps that become one group.
    """
    for module in list(model.modules()):
        for names in together:
            _join(module, names)
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(module, name, PackedLinear(child.weight, child.bias))


def _join(module: nn.Module, names: Names) -> None:
    maps = [getattr(module, name, None) for name in names]
    linear = [child for child in maps if type(child) is nn.Linear and can_pack(child.weight)]
    biases = [child.bias for child in linear if child.bias is not None]
    if len(linear) < len(names) or len(biases) not in (0, len(names)) or len({m.in_features for m in linear}) > 1:
        return
    whole = PackedGroup(torch.cat([m.weight.detach() for m in linear]), torch.cat(tuple(biases)) if biases else None)
    start = 0
    for name, child in zip(names, linear, strict=True):
        setattr(module, name, PackedSlice(whole, start, start + child.out_features))
        start += child.out_features


def packed_copy(model: Model, names: Names, together: tuple[Names, ...]) -> Model:
    """Return a copy of a model with packed maps in the children `names`; everything else is shared with the original.

    Returns the model itself if nothing can be packed.
    """
    children = [child for name, child in model.named_children() if name in names]
    if not any(type(m) is nn.Linear and can_pack(m.weight) for child in children for m in child.modules()):
        return model
    copied = copy.copy(model)
    copied.__dict__["_modules"] = dict(model._modules)
    for name in names:
        if isinstance(child := getattr(model, name, None), nn.Module):
            tensors = {id(tensor): tensor for tensor in (*child.parameters(), *child.buffers())}
            holder = nn.ModuleDict({name: copy.deepcopy(child, tensors)})  # copies only the modules
            pack(holder, together)
            setattr(copied, name, holder[name])
    return copied
