"""Finds calls after which the host would wait for a GPU, so that its queue drains."""

from __future__ import annotations

from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# operators whose result or its shape the host must know
_READ = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "equal"}


class RecordWaits(TorchDispatchMode):
    """Records the operators that make the host wait. Run it on `meta` tensors: they stand for those of a GPU.

    On `meta` the operators that read values raise an error as well.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __enter__(self) -> RecordWaits:
        super().__enter__()
        self._constructors = _RecordConstructors(self.found)
        self._constructors.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._constructors.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        if name in _READ or self._is_blocking_copy(name, args, kwargs) or self._indexes_with_mask(name, args):
            self.found.append(name)
        return func(*args, **kwargs)

    def _is_blocking_copy(self, name: str, args: Any, kwargs: Any) -> bool:
        """Return whether numbers move between host and device, other than from pinned memory in the queue's order."""
        if name == "_to_copy":
            return kwargs.get("device", args[0].device) != args[0].device and not kwargs.get("non_blocking")
        return name == "copy_" and args[0].device != args[1].device and not (args[2:] and args[2])

    def _indexes_with_mask(self, name: str, args: Any) -> bool:
        masks = [x for x in tree_leaves(args[1]) if isinstance(x, torch.Tensor)] if name.startswith("index") else []
        return any(mask.dtype in (torch.bool, torch.uint8) for mask in masks)


class _RecordConstructors(TorchFunctionMode):
    """Records tensors that are made of numbers on a device: a copy from pageable memory, which no operator shows."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.tensor, torch.as_tensor) and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            self.found.append(func.__name__)
        return func(*args, **kwargs)
