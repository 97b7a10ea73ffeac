"""How much memory this machine has, and how much of it is free."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def memory_bytes() -> float:
    """Physical memory, or the limit of the container that this runs in."""
    physical = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in _CGROUP_LIMITS:
        try:
            text = Path(path).read_text().strip()
        except OSError:
            continue
        if text.isdecimal():
            return min(physical, float(text))
    return physical


def free_memory_bytes() -> float:
    """What this process may still take: of the machine's free memory, and of the container that this runs in."""
    import psutil

    left = memory_bytes() - psutil.Process().memory_info().rss
    return max(0.0, min(float(psutil.virtual_memory().available), left))
