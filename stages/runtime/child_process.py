"""Child processes: each leads a group of its own, which ends together with its parent, and is killed as a whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from draftsmith.stages.runtime import parent_watch

_POLL_S = 0.02
_TAIL_LINES = 15


class ChildProcess:
    """A process and all that it starts. None of them outlives this process, in whatever way that ends.

    Start it from a thread that outlives it: the kernel ends it together with the thread that started it.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        stdout: int | IO[bytes],
        stderr: int | IO[bytes],
        folder: Path | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        """environment: all of it. folder: where it runs; left out, here. pass_fds: kept open in it."""
        line, self._our_end = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", parent_watch.__file__, str(line), *command],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                pass_fds=(line, *pass_fds),
                cwd=folder,
                env=environment,
            )
        except BaseException:
            os.close(self._our_end)
            raise
        finally:
            os.close(line)

    def ended(self) -> str | None:
        """Return how the process ended; None while it runs."""
        code = self.process.poll()
        return None if code is None else describe_exit(code)

    def request_stop(self, grace_s: float) -> None:
        """Send SIGTERM to the process alone, which has `grace_s` from now on, whatever becomes of this one."""
        with suppress(BrokenPipeError):  # its guard is gone
            parent_watch.extend_grace(self._our_end, grace_s)
        self.process.send_signal(signal.SIGTERM)

    def end(self, grace_s: float = 0.0, gone_s: float = 0.0) -> None:
        """Ask the process to end, wait up to `grace_s`, then kill its group, and wait up to `gone_s` for all of it."""
        if self._our_end < 0:
            return
        if grace_s > 0 and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        # The guard of the lifeline is in the group until now, so the number cannot belong to anybody else yet.
        deadline = time.monotonic() + gone_s
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            while time.monotonic() < deadline:  # zombies that nobody collects stay
                os.killpg(self.process.pid, 0)
                time.sleep(_POLL_S)
        os.close(self._our_end)
        self._our_end = -1
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def project_environment() -> dict[str, str]:
    """Return this process's environment, for a process that imports from the same places."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def describe_exit(code: int) -> str:
    """Return what an exit code says, in words."""
    return f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"


def last_lines(log: Path) -> str:
    """Return the last lines of a log."""
    with suppress(OSError), log.open(encoding="utf-8", errors="replace") as file:
        return "".join(deque(file, maxlen=_TAIL_LINES)).rstrip()
    return ""
