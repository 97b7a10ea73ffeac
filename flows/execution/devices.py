"""One accelerator, one user: locks of this machine's devices, across refreshes, homes and users.

A GPU is taken by whatever loads a model on it: two would not fit its memory, and a measurement beside anything else
measures that too. A stage takes all GPUs that it may see, a shard of one the first that is free; a run that should
leave some to others says so with CUDA_VISIBLE_DEVICES. The CPU is one device, and only what measures speed needs it
alone: trainings share its cores as any programs do, so they hold its lock together, and a measurement waits until none
of them runs.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from draftsmith.artifacts.atomic import disk_errors
from draftsmith.artifacts.locks import Holder, LockTimeoutError, LockWait, lock_holder, locked
from draftsmith.flows.execution.machine import gpu_names, plain
from draftsmith.stages.runtime.stage import Compute

FOLDER = "DRAFTSMITH_DEVICE_LOCKS"  # of the environment: where the locks lie, for all users of the machine
_DEFAULT = "/tmp/draftsmith-devices"
CPU = "cpu"


OnWait = Callable[[str, Holder | None], None]
_POLL_S = 0.5


@dataclass(frozen=True)
class Device:
    """What a process may compute on: the locks that it inherits, and what tells it so."""

    locks: tuple[int, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def lock_one_device(
    compute: Compute,
    *,
    run: str,
    limit_s: float,
    waiting: OnWait,
    check: Callable[[], None] = lambda: None,
    gpus: Callable[[], Sequence[str]] | None = None,
) -> Iterator[Device]:
    """As `devices_of`, of one GPU: the first that is free, and that alone is visible to the process."""
    names = sorted(set((gpus or gpu_names)()))
    if compute is Compute.LIGHT or not names:
        with lock_devices(compute, run=run, limit_s=limit_s, waiting=waiting, check=check, gpus=lambda: ()) as device:
            yield device
        return
    began, told = time.monotonic(), False
    while True:
        for name in names:
            with ExitStack() as stack:
                try:
                    with disk_errors("taking the lock of a device:"):
                        lock = stack.enter_context(locked(_lock_of(name), run, LockWait(0), mode=0o666))
                except LockTimeoutError:
                    continue
                yield Device((lock.fd,), {"CUDA_VISIBLE_DEVICES": name})
                return
        if time.monotonic() - began > limit_s:
            raise LockTimeoutError(
                f"no GPU came free in {limit_s / 60:g} minutes: {', '.join(names)} are in use; run the same command "
                "again later (stages.lock_wait_minutes says how long to wait)"
            )
        if not told:
            told = True
            waiting(", ".join(names), lock_holder(_lock_of(names[0])))
        check()
        time.sleep(_POLL_S)


@contextmanager
def lock_devices(
    compute: Compute,
    *,
    run: str,
    limit_s: float,
    waiting: OnWait,
    check: Callable[[], None] = lambda: None,
    gpus: Callable[[], Sequence[str]] | None = None,
) -> Iterator[Device]:
    """Hold the locks of the devices that a stage computes on; yields their descriptors, which its process inherits.

    `waiting` is called with the device and its holder where the stage has to wait, `check` while it does, and what that
    raises ends it; LockTimeoutError after `limit_s`.
    """
    if compute is Compute.LIGHT:
        yield Device()
        return
    names = (gpus or gpu_names)()
    wanted = sorted(set(names)) or [CPU]  # everybody takes them in this order, so nobody waits for another in a circle
    with ExitStack() as stack:
        held = []
        for name in wanted:
            with disk_errors("taking the lock of a device:"):
                wait = LockWait(limit_s, "stages.lock_wait_minutes", partial(waiting, name), check)
                shared = name == CPU and compute is not Compute.TIMED
                held.append(stack.enter_context(locked(_lock_of(name), run, wait, shared=shared, mode=0o666)).fd)
        yield Device(tuple(held))


def _lock_of(name: str) -> Path:
    return _folder() / f"{plain(name)}.lock"


def _folder() -> Path:
    """For all users, as /tmp is: whoever comes first makes it."""
    folder = Path(os.environ.get(FOLDER) or _DEFAULT)
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o1777)
    return folder
