"""This machine: its GPUs, its free disk space, whether the home can be written, and locks that give a GPU one user.

Two models would not fit a GPU's memory, and other work would disturb a measurement. A stage locks all GPUs that are
visible to it, a shard locks the first that is free. Set CUDA_VISIBLE_DEVICES to leave some GPUs to others. The CPU is
one device with a shared lock: trainings share its cores as any programs do, and only a stage that measures speed locks
it exclusively. Locks hold across runs, homes and users.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from draftsmith.artifacts.atomic import disk_errors
from draftsmith.artifacts.errors import DraftsmithError, from_os_error
from draftsmith.artifacts.home import protect_home
from draftsmith.artifacts.host import visible_gpus
from draftsmith.artifacts.locks import Holder, LockTimeoutError, LockWait, lock_holder, locked
from draftsmith.flows.config.options import RunOptions
from draftsmith.stages.runtime.stage import Compute


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


FOLDER = "DRAFTSMITH_DEVICE_LOCKS"  # environment variable: folder of the locks, for all users of the machine
DEFAULT_FOLDER = "/tmp/draftsmith-devices"
CPU = "cpu"

OnWait = Callable[[str, Holder | None], None]  # name of the device, who holds it
_POLL_S = 0.5


@dataclass(frozen=True)
class Device:
    """The devices of a process: descriptors of the locks that it inherits, and its environment."""

    locks: tuple[int, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def lock_devices(
    compute: Compute, run: str, wait: LockWait, on_wait: OnWait = lambda *_: None, *, one: bool = False
) -> Iterator[Device]:
    """Hold the locks of the devices that a stage computes on.

    run: name shown to those who wait. on_wait: called with the device and its holder if the stage has to wait. one: if
    there are GPUs, lock the first that is free, and make only that one visible to the process.

    Raises LockTimeoutError, and what `wait.check` raises.
    """
    if compute is Compute.LIGHT:
        yield Device()
        return
    names = gpu_names()  # one order for all prevents deadlocks
    with ExitStack() as stack:
        if one and names:
            name, fd = _lock_first_free(stack, names, run, replace(wait, on_wait=partial(on_wait, ", ".join(names))))
            yield Device((fd,), {"CUDA_VISIBLE_DEVICES": name})
            return
        descriptors = []
        for name in names or [CPU]:
            with disk_errors("taking the lock of a device:"):
                device_wait = replace(wait, on_wait=partial(on_wait, name))
                shared = name == CPU and compute is not Compute.TIMED
                lock = locked(_lock_path(name), run, device_wait, shared=shared, mode=0o666)
                descriptors.append(stack.enter_context(lock).fd)
        yield Device(tuple(descriptors))


def _lock_first_free(stack: ExitStack, names: Sequence[str], run: str, wait: LockWait) -> tuple[str, int]:
    """Return the first device that is free, and the descriptor of its lock, which `stack` holds."""
    began, waits = time.monotonic(), False
    while True:
        for name in names:
            with suppress(LockTimeoutError), disk_errors("taking the lock of a device:"):
                return name, stack.enter_context(locked(_lock_path(name), run, LockWait(0), mode=0o666)).fd
        if time.monotonic() - began > wait.limit_s:
            raise LockTimeoutError(
                f"No GPU became free within {wait.limit_s / 60:g} minutes (stages.lock_wait_minutes). In use: "
                f"{', '.join(names)}. Run the same command again later."
            )
        if not waits:
            waits = True
            wait.on_wait(lock_holder(_lock_path(names[0])))
        wait.check()
        time.sleep(_POLL_S)


def _lock_path(name: str) -> Path:
    return _folder() / f"{name.replace('/', '_')}.lock"


def _folder() -> Path:
    """Return the folder of the locks. The first user creates it, writable for all as /tmp is."""
    folder = Path(os.environ.get(FOLDER) or DEFAULT_FOLDER)
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o1777)
    return folder
