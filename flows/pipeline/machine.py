"""What the machine has: memory of the CPU and of the GPUs, free disk, a home that can be written."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, from_os_error
from draftsmith.flows.pipeline.options import RunOptions

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


@functools.cache
def gpus() -> tuple[float, ...]:
    """Bytes of memory of every visible NVIDIA GPU; asks nvidia-smi, so that no context is opened."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    sizes = tuple(float(line) * 2**20 for line in done.stdout.split() if line.strip().isdecimal())
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return sizes
    return sizes[: len([each for each in visible.split(",") if each.strip() not in ("", "-1")])]


def free_disk_bytes(folder: Path) -> float:
    """Of the disk that `folder`, or the nearest folder above it that exists, lies on."""
    while not folder.exists():
        folder = folder.parent
    disk = os.statvfs(folder)
    return float(disk.f_bavail * disk.f_frsize)


def check_home(home: Path, options: RunOptions) -> None:
    """The home exists, can be written, and its disk has room."""
    try:
        home.mkdir(parents=True, exist_ok=True)
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
