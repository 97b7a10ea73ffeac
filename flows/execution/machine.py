"""Looks at the machine: its GPUs, its free disk space, and whether the home can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, from_os_error
from draftsmith.artifacts.home import protect_home
from draftsmith.artifacts.host import visible_gpus
from draftsmith.flows.config.options import RunOptions


def gpus() -> tuple[float, ...]:
    """Return the bytes of memory of every visible NVIDIA GPU, in the order of CUDA_VISIBLE_DEVICES."""
    return tuple(gpu.memory for gpu in visible_gpus())


def gpu_model() -> str | None:
    """Return the name of the first visible GPU."""
    return next((gpu.model for gpu in visible_gpus()), None)


def gpu_names() -> list[str]:
    """Return names that identify the visible GPUs, the same for all users and in any form of CUDA_VISIBLE_DEVICES.

    A GPU's name is its UUID. A slice of a GPU (MIG) has the name in CUDA_VISIBLE_DEVICES.
    """
    return sorted({gpu.uuid for gpu in visible_gpus()})


def free_disk_bytes(folder: Path) -> float:
    """Return the free space of the disk of `folder`, or of its nearest parent that exists."""
    while not folder.exists():
        folder = folder.parent
    disk = os.statvfs(folder)
    return float(disk.f_bavail * disk.f_frsize)


def check_home(home: Path, options: RunOptions) -> None:
    """Create the home if needed, and set its permissions. Raises DraftsmithError if that fails or the disk is full."""
    try:
        protect_home(home, group_may_read=options.stages.group_may_read)
        with tempfile.TemporaryFile(dir=home) as probe:
            probe.write(b"x")
    except OSError as error:
        raise from_os_error(error, f"preparing {home}:") from error
    free_gb = free_disk_bytes(home) / 1e9
    wanted_gb = options.stages.min_free_gb
    if free_gb < wanted_gb:
        raise DraftsmithError(
            f"{home}: {free_gb:.1f} GB are free, and stages.min_free_gb is {wanted_gb:g}. Free some space, or set "
            "DRAFTSMITH_HOME to another disk."
        )
