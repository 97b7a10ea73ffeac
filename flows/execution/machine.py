"""What the machine has: GPUs, free disk, a home that can be written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, from_os_error
from draftsmith.artifacts.home import protect_home
from draftsmith.artifacts.host import visible_gpus
from draftsmith.flows.config.options import RunOptions

# TFLOP/s of dense products in bfloat16, as data sheets have it
NOMINAL_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "A100": 312, "L40S": 362}


def nominal_tflops(name: str) -> float | None:
    """Of a GPU by its name; None: of an unknown one."""
    return next((float(rate) for known, rate in NOMINAL_TFLOPS.items() if known in name), None)


def gpus() -> tuple[float, ...]:
    """Return the bytes of memory of every visible NVIDIA GPU, in the order of CUDA_VISIBLE_DEVICES."""
    return tuple(gpu.memory for gpu in visible_gpus())


def gpu_model() -> str | None:
    """Return the name of the first visible GPU."""
    return next((gpu.model for gpu in visible_gpus()), None)


def gpu_names() -> list[str]:
    """Return what visible GPUs are told apart by, the same for all users: numbers count in the order of nvidia-smi, and
    a UUID may be given by its beginning; a part of a GPU (MIG) has the name that it is given by."""
    return sorted({gpu.uuid for gpu in visible_gpus()})


def plain(name: str) -> str:
    """Of a GPU or a part of one, as a file may be called."""
    return name.replace("/", "_")


def free_disk_bytes(folder: Path) -> float:
    """Of the disk that `folder`, or the nearest folder above it that exists, lies on."""
    while not folder.exists():
        folder = folder.parent
    disk = os.statvfs(folder)
    return float(disk.f_bavail * disk.f_frsize)


def check_home(home: Path, options: RunOptions) -> None:
    """The home exists, is closed to others, can be written, and its disk has room."""
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
            f"{home}: {free_gb:.1f} GB free, {wanted_gb:g} GB wanted (stages.min_free_gb): free some space or point "
            "DRAFTSMITH_HOME at another disk"
        )
