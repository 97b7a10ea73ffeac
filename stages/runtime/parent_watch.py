"""The lifeline: a pipe that ties a process group to the life of its parent, even if that is killed with SIGKILL.

The parent keeps the write end, the child forks a guard that waits on the read end. When the parent ends in whatever
way, the kernel closes the write end and the guard kills the group: the child, its workers, and itself. The guard is a
process, not a thread: native code that holds the interpreter lock cannot delay it.

A parent that has asked the child to stop says so through the pipe (`promise`), with the seconds that the child has to
save. Those the child keeps, also if somebody kills the parent meanwhile, as Prefect does with a cancelled run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>
_LAST_FD = 65536
_POLL_S = 0.1


def die_with_parent(lifeline: int) -> None:
    """Kill this process's whole group when the write end of `lifeline` closes. Call it before starting any thread.

    The caller must lead its own process group (`Popen(start_new_session=True)`), or its siblings would die with it.
    """
    if os.getpgrp() != os.getpid():
        os.setpgid(0, 0)
    parent = os.getppid()
    if os.fork() == 0:
        _guard(lifeline)
    os.close(lifeline)
    if sys.platform == "linux":
        # A second line of defence, without the guard's reach to the grandchildren: the kernel tells this process alone.
        # It must not come first: it fires when the parent's *thread* ends, and that thread waits for us.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent died before prctl
            os.killpg(0, signal.SIGKILL)


def promise(our_end: int, grace_s: float) -> None:
    """Give a child that is asked to stop `grace_s` from now on, whatever becomes of its parent."""
    os.write(our_end, f"{grace_s}\n".encode())


def _guard(lifeline: int) -> None:
    """Wait, as the guard process, for the end of the parent, then kill the group. Never returns."""
    child, until = os.getppid(), 0.0
    try:
        for ignored in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(ignored, signal.SIG_IGN)
        os.closerange(0, lifeline)  # or the readers of our pipes would wait for the guard
        os.closerange(lifeline + 1, _LAST_FD)
        while told := os.read(lifeline, 64):
            until = time.monotonic() + float(told.split()[-1])
        while time.monotonic() < until and os.getppid() == child:
            time.sleep(_POLL_S)
    finally:
        os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run a command with a lifeline: `python -I -S lifeline.py FD COMMAND...`."""
    die_with_parent(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])


if __name__ == "__main__":
    main()
