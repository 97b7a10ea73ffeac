"""When the memory does not hold a piece of work: once more in halves, where its parts do not depend on each other."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import TypeVar

Part = TypeVar("Part")
Result = TypeVar("Result")


def out_of_memory(error: BaseException) -> bool:
    """Is it the refusal of an allocator: Python's, torch's on a CPU or on a GPU?"""
    import torch

    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def release_memory() -> None:
    """Give the memory of what was dropped back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def retry_in_halves(
    parts: Sequence[Part], work: Callable[[Sequence[Part]], Sequence[Result]], log: Callable[[str], None]
) -> list[Result]:
    """`work(parts)`, one result a part; if the memory does not hold them together, of the first half and the second.

    Only for results that do not depend on the other parts of a call, but for the rounding of other matrix shapes.
    """
    try:
        return list(work(parts))
    except Exception as error:
        if not out_of_memory(error) or len(parts) < 2:
            raise
    release_memory()  # not above: the error's frames hold what is to be given back
    middle = len(parts) // 2
    log(f"out of memory with {len(parts)} together: once more with {middle}")
    return [*work(parts[:middle]), *work(parts[middle:])]


# How many new objects Python collects garbage after. While libraries are imported nearly all of them stay, and looking
# through them over and over would be a fifth of what a start takes.
_USUAL, _AT_START = gc.get_threshold(), (50_000, 20, 20)


def relax_gc() -> None:
    """From here to the work itself: the first progress that a stage reports, the flow of a command."""
    gc.set_threshold(*_AT_START)


def restore_gc() -> None:
    """From here on."""
    gc.set_threshold(*_USUAL)
