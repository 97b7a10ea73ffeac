"""Memory of a stage process: retries after an allocator's refusal, copies to the device, and garbage collection.

The command line imports this module first, so torch is imported only where it is used.
"""

from __future__ import annotations

import gc
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch

Item = TypeVar("Item")
Result = TypeVar("Result")


def out_of_memory(error: BaseException) -> bool:
    """Return whether an allocator raised the error: Python's, or torch's on a CPU or a GPU."""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def release_memory() -> None:
    """Return the memory of dropped objects to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def to_device(values: Sequence[object] | np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy numbers of the host to a device without waiting for the kernels that are queued there."""
    import torch

    tensor = torch.as_tensor(values)
    if device.type == "cuda":  # a copy from pageable memory would wait for them
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def peak_memory_gb() -> float:
    """Return the peak memory of this process in GB: on its GPU, by torch's allocator, or else on the machine."""
    torch = sys.modules.get("torch")  # stages without a model do not import it
    if torch is not None and torch.cuda.is_initialized():
        return float(torch.cuda.max_memory_allocated() / 1e9)
    peak = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text("utf-8"))
    return 0.0 if peak is None else int(peak[1]) * 1024 / 1e9


def retry_in_halves(
    items: Sequence[Item], work: Callable[[Sequence[Item]], Sequence[Result]], log: Callable[[str], None]
) -> list[Result]:
    """Return `work(items)`, one result per item; if memory runs out, call it on each half.

    Use it only if an item's result does not depend on the other items of the call, except for rounding.
    """
    try:
        return list(work(items))
    except Exception as error:
        if not out_of_memory(error) or len(items) < 2:
            raise
    release_memory()  # not in the handler: there the error's frames still hold the memory
    middle = len(items) // 2
    log(f"out of memory with {len(items)} items at once. Trying {middle}.")
    return [*work(items[:middle]), *work(items[middle:])]


# Allocations between collections. While libraries are imported nearly all new objects stay, and scanning them again and
# again would take a fifth of the start-up time.
_DEFAULT, _AT_START = gc.get_threshold(), (50_000, 20, 20)


def relax_gc() -> None:
    """Collect garbage rarely until the work starts: a stage's first progress, or the flow of a command."""
    gc.set_threshold(*_AT_START)


def restore_gc() -> None:
    """Collect garbage at Python's default rate again."""
    gc.set_threshold(*_DEFAULT)
