"""Weights in the order in which oneDNN's kernels read them: decoding on a CPU is bound by reading them.

A plain linear map in bfloat16 has its weight put into that order at every call; a frozen one can be once. The product
is the same bit for bit; with a bias it is rounded once instead of twice. The operators are those that torch's own
compiler calls for frozen weights. Maps that read the same input are one map: a call reads more in one go.
"""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)

Names = tuple[str, ...]

# Maps of a decoder's modules that read the same tensor, in this order.
TOGETHER: tuple[Names, ...] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


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


class PackedTogether(PackedLinear):
    """Maps of one input, stacked. The parts take their rows one after the other from a product that is made once."""

    _made: tuple[torch.Tensor, torch.Tensor] | None = None  # the input, and its product

    def rows(self, x: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """[..., start:stop] of the product; it is kept until its last rows are taken."""
        made = self._made
        product = made[1] if made is not None and made[0] is x else self(x)
        self._made = None if stop == self.out_features else (x, product)
        return product[..., start:stop]


class PackedPart(nn.Module):
    """One of them, in the place of a model's own map."""

    def __init__(self, whole: PackedTogether, start: int, stop: int):
        super().__init__()
        self.whole, self.start, self.stop = whole, start, stop
        self.in_features, self.out_features = whole.in_features, stop - start

    @property
    def weight(self) -> torch.Tensor:
        """As of PackedLinear."""
        return self.whole.weight[self.start : self.stop]

    @property
    def bias(self) -> torch.Tensor | None:
        return None if self.whole.bias is None else self.whole.bias[self.start : self.stop]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.whole.rows(x, self.start, self.stop)


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


def pack(model: nn.Module, together: tuple[Names, ...] = TOGETHER) -> None:
    """Replace the linear maps of a frozen model where they can be packed; those of a module that are named together
    are one map then. One after the other: it takes no more memory than the largest."""
    for module in list(model.modules()):
        for names in together:
            _join(module, names)
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and can_pack(child.weight):
                setattr(module, name, PackedLinear(child.weight, child.bias))


def _join(module: nn.Module, names: Names) -> None:
    maps = [getattr(module, name, None) for name in names]
    linear = [each for each in maps if type(each) is nn.Linear and can_pack(each.weight)]
    biases = [each.bias for each in linear if each.bias is not None]
    if len(linear) < len(names) or len(biases) not in (0, len(names)) or len({m.in_features for m in linear}) > 1:
        return
    whole = PackedTogether(torch.cat([m.weight.detach() for m in linear]), torch.cat(tuple(biases)) if biases else None)
    start = 0
    for name, each in zip(names, linear, strict=True):
        setattr(module, name, PackedPart(whole, start, start + each.out_features))
        start += each.out_features


def packed_copy(model: Model, names: Names, together: tuple[Names, ...]) -> Model:
    """The model with packed maps in its children of these names; everything else is shared with it, and it is left as
    it is. Itself where nothing can be packed."""
    children = [child for name, child in model.named_children() if name in names]
    if not any(type(m) is nn.Linear and can_pack(m.weight) for child in children for m in child.modules()):
        return model
    copied = _twin(model)
    for name in names:
        if isinstance(child := getattr(model, name, None), nn.Module):
            holder = nn.ModuleDict({name: _deep_twin(child)})
            pack(holder, together)
            setattr(copied, name, holder[name])
    return copied


def _twin(module: Model) -> Model:
    """Another module of the same parameters and children, which may be given others."""
    twin = copy.copy(module)
    twin.__dict__["_modules"] = dict(module._modules)
    return twin


def _deep_twin(module: Model) -> Model:
    twin = _twin(module)
    for name, child in module.named_children():
        twin._modules[name] = _deep_twin(child)
    return twin
