"""Properties of this machine: memory, GPUs, file systems, and how to reach it without a proxy."""

from __future__ import annotations

import functools
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import pynvml

_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
# SQLite's locks and write order are unreliable on these (https://www.sqlite.org/howtocorrupt.html, section 2.1).
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
    """Return the bytes of physical memory, or the container's limit if that is lower."""
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
    """Return the bytes that this process can still allocate, within the machine's free memory and the container's."""
    left = memory_bytes() - psutil.Process().memory_info().rss
    return max(0.0, min(float(psutil.virtual_memory().available), left))


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU, or a MIG slice of one."""

    uuid: str  # the same for all users; for a MIG slice its name in CUDA_VISIBLE_DEVICES
    memory: float  # bytes; for a MIG slice, of the whole first GPU
    model: str


@dataclass(frozen=True)
class GpuModel:
    """A model of GPU, for estimates: values of its data sheet, and an assumed, unmeasured share of its peak."""

    memory: float  # bytes
    peak: float  # FLOP/s of dense products in bfloat16
    share: float  # share of the peak that a whole stage is assumed to reach

    @property
    def rate(self) -> float:
        """Return the FLOP/s that a stage is assumed to reach."""
        return self.share * self.peak


GPU_MODELS = {  # by a part of the name that the driver reports
    "H100": GpuModel(80e9, 989e12, 0.4),
    "H200": GpuModel(141e9, 989e12, 0.4),
}


@functools.cache
def all_gpus() -> tuple[Gpu, ...]:
    """Return every NVIDIA GPU in nvidia-smi's order, without creating a CUDA context."""
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


def gpu_driver() -> tuple[str, int] | None:
    """Return the version of NVIDIA's driver and the highest major version of CUDA that it runs; None without one."""
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion()), int(pynvml.nvmlSystemGetCudaDriverVersion_v2()) // 1000
    except pynvml.NVMLError:
        return None


def visible_gpus() -> list[Gpu]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES names by number or UUID, or all if it is not set.

    Like CUDA, stops at the first name that does not exist.
    """
    gpus = all_gpus()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not gpus or visible is None:
        return list(gpus)
    selected = []
    for name in filter(None, (name.strip() for name in visible.split(","))):
        if (gpu := _find_gpu(name, gpus)) is None:
            break
        selected.append(gpu)
    return selected


def _find_gpu(name: str, gpus: tuple[Gpu, ...]) -> Gpu | None:
    if name.isdecimal():
        return gpus[int(name)] if int(name) < len(gpus) else None
    if name.startswith("MIG-"):
        return replace(gpus[0], uuid=name)
    matches = [gpu for gpu in gpus if gpu.uuid.startswith(name)] if name.startswith("GPU-") else []
    return matches[0] if len(matches) == 1 else None


def network_file_system(path: Path) -> str | None:
    """Return "type at mount point" if the path is on a network file system, else None.

    A path that does not exist has the file system of its nearest existing parent.
    """
    existing = path.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    existing = existing.resolve()
    mounts = [mount for mount in psutil.disk_partitions(all=True) if existing.is_relative_to(mount.mountpoint)]
    mount = max(reversed(mounts), key=lambda mount: len(mount.mountpoint), default=None)  # on a tie the last is on top
    if mount is None or not (mount.fstype in NETWORK_FILE_SYSTEMS or _FUSE_NETWORK.fullmatch(mount.fstype)):
        return None
    return f"{mount.fstype} at {mount.mountpoint}"


def bypass_proxy_for_localhost() -> None:
    """Add this machine to `no_proxy`, for this process and its children: a proxy cannot reach our servers."""
    excluded = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
    hosts = [host.strip() for host in excluded.split(",")]
    if excluded.strip() != "*":  # libraries read one of the two names, or the first that is set
        exclusions = ",".join(filter(None, [excluded, *(host for host in _LOCALHOST if host not in hosts)]))
        os.environ["no_proxy"] = os.environ["NO_PROXY"] = exclusions
