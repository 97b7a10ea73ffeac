"""A pipe that ties a process group to the life of its parent, even if the parent is killed with SIGKILL.

The parent holds the write end; the child forks a guard that waits on the read end. However the parent ends, the kernel
closes the write end, and the guard kills the group: the child, its workers and itself. The guard is a process, not a
thread: native code that holds the interpreter lock cannot delay it.

A parent that asks the child to stop sends through the pipe how many seconds the child has to save (`extend_grace`). The
child keeps them even if the parent is then killed, as Prefect does with a cancelled run.
"""

from __future__ import annotations

import os
import signal
import sys
import time

_LAST_FD = 65536
_POLL_S = 0.1


def die_with_parent(watched: int) -> None:
    """Kill this process's group when the pipe's write end closes. Call it before any thread is started.

    watched: file descriptor of the read end. The caller must lead its own process group
    (`Popen(start_new_session=True)`), or its siblings would be killed with it.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    if os.fork() == 0:
        _guard(watched)
    os.close(watched)


def extend_grace(write_end: int, grace_s: float) -> None:
    """Give a child that is asked to stop `grace_s` seconds from now, even if its parent ends."""
    os.write(write_end, f"{grace_s}\n".encode())


def _guard(watched: int) -> None:
    """Wait for the end of the parent, then kill the group. Runs in the guard process and never returns."""
    child, until = os.getppid(), 0.0
    try:
        for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_IGN)
        os.closerange(0, watched)  # else the readers of our pipes would wait for the guard
        os.closerange(watched + 1, _LAST_FD)
        while message := os.read(watched, 64):
            until = time.monotonic() + float(message.split()[-1])
        while time.monotonic() < until and os.getppid() == child:
            time.sleep(_POLL_S)
    finally:
        os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run a command that ends with its parent: `python -I -S parent_watch.py FD COMMAND...`."""
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
