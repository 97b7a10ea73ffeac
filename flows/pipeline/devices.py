"""One accelerator, one user: locks of this machine's devices, across refreshes, homes and users.

A GPU is taken by whatever loads a model on it: two would not fit its memory, and a measurement beside anything else
measures that too. A stage takes all GPUs that it may see; a run that should leave some to others says so with
CUDA_VISIBLE_DEVICES. The CPU is one device, and only what measures speed needs it alone: trainings share its cores as
any programs do, so they hold its lock together, and a measurement waits until none of them runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from draftsmith.artifacts.atomic import disk_errors
from draftsmith.artifacts.locks import Holder, locked
from draftsmith.flows.pipeline.machine import gpu_names
from draftsmith.stages.contract import Compute

FOLDER = "DRAFTSMITH_DEVICE_LOCKS"  # of the environment: where the locks lie, for all users of the machine
_DEFAULT = "/tmp/draftsmith-devices"
CPU = "cpu"


@contextmanager
def devices_of(
    compute: Compute,
    *,
    run: str,
    limit_s: float,
    waiting: Callable[[str, Holder | None], None],
    gpus: Callable[[], Sequence[str]] | None = None,
) -> Iterator[tuple[int, ...]]:
    """Hold the locks of the devices that a stage computes on; yields their descriptors, which its process inherits.

    `waiting` is called with the device and its holder where the stage has to wait; LockTimeoutError after `limit_s`.
    """
    if compute is Compute.LIGHT:
        yield ()
        return
    names = (gpus or gpu_names)()
    wanted = sorted(set(names)) or [CPU]  # everybody takes them in this order, so nobody waits for another in a circle
    with ExitStack() as stack:
        held = []
        for name in wanted:
            with disk_errors("taking the lock of a device:"):
                lock = locked(
                    _folder() / f"{name}.lock",
                    lambda holder, name=name: waiting(name, holder),  # type: ignore[misc]
                    run=run,
                    limit_s=limit_s,
                    limit_field="stages.lock_wait_minutes",
                    shared=name == CPU and compute is not Compute.TIMED,
                    mode=0o666,
                )
                held.append(stack.enter_context(lock).fd)
        yield tuple(held)


def _folder() -> Path:
    """For all users, as /tmp is: whoever comes first makes it."""
    folder = Path(os.environ.get(FOLDER) or _DEFAULT)
    if not folder.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o1777)
    return folder
