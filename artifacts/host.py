"""What this machine has and how it is reached: memory, GPUs, file systems, and no proxy to itself."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
MOUNTS = Path("/proc/self/mounts")
# SQLite's locks and its write order are not kept there (https://www.sqlite.org/howtocorrupt.html, section 2.1).
NETWORK_FILE_SYSTEMS = frozenset(
    (
        *("9p", "afs", "beegfs", "ceph", "cifs", "coda", "davfs", "fhgfs", "glusterfs", "gpfs", "juicefs", "lustre"),
        *("ncpfs", "nfs", "nfs4", "orangefs", "pvfs2", "smb3", "smbfs", "wekafs"),
    )
)
_FUSE_NETWORK = re.compile(
    r"fuse\.(.*(nfs|ssh|smb|cifs|s3|gcs|blob|dav|rclone|juice|gluster|ceph|seaweed|alluxio|goofys|weka).*)"
)
_LOCALHOST = ("127.0.0.1", "localhost")


def memory_bytes() -> float:
    """Return the bytes of physical memory, or the limit of the container that this runs in."""
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
    """Return the bytes that this process may still take, of the machine's free memory and of its container."""
    import psutil

    left = memory_bytes() - psutil.Process().memory_info().rss
    return max(0.0, min(float(psutil.virtual_memory().available), left))


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, or a part of one (MIG)."""

    uuid: str  # the same for all users; of a part the name that CUDA_VISIBLE_DEVICES gives it
    memory: float  # bytes; of a part those of the whole first GPU
    model: str


@functools.cache
def all_gpus() -> tuple[Gpu, ...]:
    """Return every NVIDIA GPU in the order of nvidia-smi, without opening a context."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        return tuple(
            Gpu(
                str(pynvml.nvmlDeviceGetUUID(handle)),
                float(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                str(pynvml.nvmlDeviceGetName(handle)),
            )
            for handle in handles
        )
    except pynvml.NVMLError:
        return ()


def visible_gpus() -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names by number or UUID, or all if it is not set.

    As CUDA reads it, names after one that is not there do not count.
    """
    known = all_gpus()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not known or named is None:
        return list(known)
    found = []
    for each in filter(None, (name.strip() for name in named.split(","))):
        if (gpu := _find_gpu(each, known)) is None:
            break
        found.append(gpu)
    return found


def _find_gpu(name: str, known: tuple[Gpu, ...]) -> Gpu | None:
    if name.isdecimal():
        return known[int(name)] if int(name) < len(known) else None
    if name.startswith("MIG-"):
        return replace(known[0], uuid=name)
    begun = [gpu for gpu in known if gpu.uuid.startswith(name)] if name.startswith("GPU-") else []
    return begun[0] if len(begun) == 1 else None


def file_system(path: Path) -> tuple[str, str]:
    """Return (type, mount point) of the file system of a path, or of the nearest folder above it that exists.

    ("", "") where the system does not say.
    """
    there = path.absolute()
    while not there.exists() and there != there.parent:
        there = there.parent
    there = there.resolve()
    try:
        lines = MOUNTS.read_text("utf-8", errors="surrogateescape").splitlines()
    except OSError:
        return "", ""
    found, place = "", ""
    for line in lines:
        fields = line.split(" ")
        if len(fields) < 3:
            continue
        mounted = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal.group(1), 8)), fields[1])
        if there.is_relative_to(mounted) and len(mounted) >= len(place):  # the last one mounted there is on top
            found, place = fields[2], mounted
    return found, place


def network_file_system(path: Path) -> str | None:
    """Return type and mount point of a file system that other machines may share, in words; None for a local one."""
    kind, place = file_system(path)
    return f"{kind} at {place}" if kind in NETWORK_FILE_SYSTEMS or _FUSE_NETWORK.fullmatch(kind) else None


def bypass_proxy_for_localhost() -> None:
    """Exclude this machine from proxies, for this process and those that it starts: its servers are unknown to them.

    What the user has excluded stays.
    """
    known = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in known.split(",")]
    if known.strip() != "*":  # libraries read one of the two names, or the first that is set
        exclusions = ",".join(filter(None, [known, *(each for each in _LOCALHOST if each not in hosts)]))
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = exclusions
