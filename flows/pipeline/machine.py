"""What the machine has: memory of the CPU and of the GPUs, free disk, a home that can be written."""

from __future__ import annotations

import functools
import os
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, from_os_error
from draftsmith.artifacts.private import protect
from draftsmith.flows.pipeline.options import RunOptions


@functools.cache
def _query(fields: str) -> tuple[tuple[str, ...], ...]:
    """A row of the fields for every NVIDIA GPU; asks nvidia-smi, so that no context is opened."""
    try:
        done = subprocess.run(
            ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(tuple(cell.strip() for cell in line.split(",")) for line in done.stdout.splitlines() if line.strip())


def _visible(known: Mapping[str, str]) -> list[str]:
    """UUIDs of what CUDA_VISIBLE_DEVICES names by number or UUID, or all if it is not set; a part of a GPU (MIG) by the
    name that it is given by. Nothing behind a name that is not there, as CUDA reads it.

    known: UUIDs by number.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not known or named is None:
        return list(known.values())
    found = []
    for each in filter(None, (name.strip() for name in named.split(","))):
        if (name := _whole(each, known)) is None:
            break
        found.append(name)
    return found


@dataclass(frozen=True)
class _Gpu:
    memory: float  # bytes
    model: str


def _seen() -> list[_Gpu]:
    """Every visible NVIDIA GPU, in the order of CUDA_VISIBLE_DEVICES. A part of one (MIG) is described as the first."""
    rows = [row for row in _query("index,uuid,memory.total,name") if len(row) == 4 and row[2].isdecimal()]
    known = {uuid: _Gpu(float(memory) * 2**20, model) for _, uuid, memory, model in rows}
    first = next(iter(known.values()), None)
    found = (known.get(name, first) for name in _visible({row[0]: row[1] for row in rows}))
    return [gpu for gpu in found if gpu is not None]


def gpus() -> tuple[float, ...]:
    """Bytes of memory of every visible NVIDIA GPU."""
    return tuple(each.memory for each in _seen())


# TFLOP/s of dense products in bfloat16, as data sheets have it
NOMINAL_TFLOPS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "GH200": 989, "A100": 312, "L40S": 362}


def nominal_tflops(name: str) -> float | None:
    """Of a GPU by its name; None: of an unknown one."""
    return next((float(rate) for known, rate in NOMINAL_TFLOPS.items() if known in name), None)


def gpu_model() -> str | None:
    """The name of the first visible GPU."""
    return next((each.model for each in _seen()), None)


def gpu_names() -> list[str]:
    """What visible GPUs are told apart by: their UUIDs, the same for all users (numbers count in the order of
    nvidia-smi, and a UUID may be given by its beginning); a part of a GPU (MIG) by the name that it is given by."""
    return sorted(set(_visible({row[0]: row[1] for row in _query("index,uuid") if len(row) == 2})))


def _whole(named: str, known: Mapping[str, str]) -> str | None:
    if named in known:
        return known[named]
    if named.startswith("MIG-"):
        return named
    begun = [uuid for uuid in known.values() if uuid.startswith(named)] if named.startswith("GPU-") else []
    return begun[0] if len(begun) == 1 else None


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
        protect(home, group_may_read=options.stages.group_may_read)
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
