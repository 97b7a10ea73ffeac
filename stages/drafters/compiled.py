"""Compiles functions for CUDA: the operations between a layer's matrix products become a few kernels.

The target's forwards are not compiled, since a compiled layer rounds differently. In one trial on a CPU most of the
test bed's features changed: in float32 in their last digits, and in bfloat16 so that 7 of 1,280 argmaxes differed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import nn

Method = TypeVar("Method", bound=Callable[..., Any])

_MOST_GRAPHS = 64


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function for tensors of any length."""
    # One graph for each of: gradients or none, one row or several, one block of queries or of keys or several, sizes
    # that are equal by chance. Beyond the default limit of 8 a function runs uncompiled, and attention keeps all its
    # scores in memory.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MOST_GRAPHS)
    return torch.compile(function, dynamic=True)


def is_compiled(module: nn.Module, x: torch.Tensor) -> bool:
    """Return whether a part of a module is compiled for this input: in training on CUDA."""
    return module.training and x.is_cuda


def fused(method: Method) -> Method:
    """Compile a method of a module. It takes a tensor first, and returns tensors that depend only on its arguments."""

    @wraps(method)
    def call(self: nn.Module, x: torch.Tensor, *rest: Any) -> Any:
        return (compiled(method) if is_compiled(self, x) else method)(self, x, *rest)

    return cast(Method, call)
