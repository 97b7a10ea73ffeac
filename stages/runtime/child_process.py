"""Child processes, each with a process group that ends with its parent and is killed as a whole."""

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
    """A process and all its children. None of them outlives this process, however it ends."""

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
        """Start the command.

        environment: the whole environment. folder: the working directory; by default this process's. pass_fds: file
        descriptors that stay open in it.
        """
        watched, self._write_end = os.pipe()
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-I", "-S", parent_watch.__file__, str(watched), *command],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                pass_fds=(watched, *pass_fds),
                cwd=folder,
                env=environment,
            )
        except BaseException:
            os.close(self._write_end)
            raise
        finally:
            os.close(watched)

    def ended(self) -> str | None:
        """Return how the process ended; None while it runs."""
        code = self.process.poll()
        return None if code is None else describe_exit(code)

    def request_stop(self, grace_s: float) -> None:
        """Send SIGTERM only to the process, not its group; it has `grace_s` to end, even if this process ends first."""
        with suppress(BrokenPipeError):  # its guard has ended
            parent_watch.extend_grace(self._write_end, grace_s)
        self.process.send_signal(signal.SIGTERM)

    def end(self, grace_s: float = 0.0, gone_s: float = 0.0) -> None:
        """Send SIGTERM, wait up to `grace_s`, then kill the group and wait up to `gone_s` for its processes to end."""
        if self._write_end < 0:
            return
        if grace_s > 0 and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(grace_s)
        # The guard (parent_watch.py) is in the group until now, so the group's number cannot have been reused.
        deadline = time.monotonic() + gone_s
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            while time.monotonic() < deadline:  # zombies that nobody reaps stay
                os.killpg(self.process.pid, 0)
                time.sleep(_POLL_S)
        os.close(self._write_end)
        self._write_end = -1
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def project_environment() -> dict[str, str]:
    """Return this process's environment with PYTHONPATH set, so that a child imports from the same places."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def describe_exit(code: int) -> str:
    """Return how a process with this exit code ended, in words."""
    return f"was killed ({signal.Signals(-code).name})" if code < 0 else f"ended with code {code}"


def last_lines(log: Path) -> str:
    """Return the last lines of a log file; empty if it cannot be read."""
    with suppress(OSError), log.open(encoding="utf-8", errors="replace") as file:
        return "".join(deque(file, maxlen=_TAIL_LINES)).rstrip()
    return ""
