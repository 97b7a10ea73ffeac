"""File locks that the kernel releases when their holder dies, with a note that names the holder.

On one machine the kernel knows reliably which holders are alive. On a shared file system it may not: a restarted server
or an expired lease releases the lock of a holder that is only slow. So every holder writes a unique token into the
lock file, and before it commits anything checks that the token is still there (`Lock.check`). A holder that was
presumed dead therefore cannot commit.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import platform
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, RetryableError

LOCK_LIMIT_S = 600.0  # enough for a database migration or the start of a server
_POLL_S = 0.2
_CHECK_EVERY_S = 10.0
_NOTE_BYTES = 4096


@dataclass(frozen=True)
class Holder:
    """Identifies the process that took a lock, and when."""

    token: str
    host: str
    pid: int
    user: str
    run: str
    since: str  # ISO 8601, UTC

    def __str__(self) -> str:
        run = f"run {self.run}, " if self.run else ""
        since = datetime.fromisoformat(self.since).astimezone().isoformat(sep=" ", timespec="seconds")
        return f"{run}pid {self.pid} of {self.user} on {self.host}, since {since}"


class LockTimeoutError(RetryableError):
    """The holder of a lock did not release it in time."""


class LockLostError(DraftsmithError):
    """Another process took over the lock, so this one must not commit anything."""


@dataclass(frozen=True)
class Lock:
    """A lock that lasts until the last process that has its descriptor ends."""

    path: Path
    fd: int
    token: str  # empty if the lock is shared
    _checked: list[float] = field(default_factory=lambda: [time.monotonic()])  # time of the last check

    def check(self) -> None:
        """Raise LockLostError if the lock file is gone or names another holder."""
        try:  # by path, not by descriptor: a lock file that was removed and created again is another file
            holder = _parse_holder(self.path.read_bytes())
        except FileNotFoundError:
            holder = None
        except OSError as error:
            raise RetryableError(f"{self.path}: cannot be read ({error.strerror}). Check the disk.") from error
        if holder is None or holder.token != self.token:
            by = str(holder) if holder is not None else "an unknown process"
            raise LockLostError(
                f"{self.path}: the lock was taken over by {by}, while this run was presumed dead, so its result is "
                "discarded. Run the same command again: it waits for the other run."
            )

    def check_periodically(self) -> None:
        """Call `check` at most every ten seconds, for use in long work."""
        if time.monotonic() - self._checked[0] > _CHECK_EVERY_S:
            self._checked[0] = time.monotonic()
            self.check()


@dataclass(frozen=True)
class LockWait:
    """How long to wait for a lock's holder, and what to do meanwhile."""

    limit_s: float = LOCK_LIMIT_S  # then LockTimeoutError is raised
    limit_field: str = ""  # the config field that sets the limit, for the error
    on_wait: Callable[[Holder | None], None] = lambda _holder: None  # called once, if there is a wait
    check: Callable[[], None] = lambda: None  # called repeatedly during the wait; its errors end the wait


@contextmanager
def locked(
    path: Path, run: str = "", wait: LockWait = LockWait(), *, shared: bool = False, mode: int | None = None
) -> Iterator[Lock]:
    """Hold the lock of a file, after waiting for its holder.

    There is no unlocking: the lock is released when the last process that has the descriptor closes it or dies. So a
    child that inherits the descriptor keeps the lock as long as it lives.

    run: name shown to processes that wait for this one. shared: take a shared lock, which excludes only exclusive
    ones. mode: permissions of the file, whatever the umask; by default the group may read it if it may read the folder.
    Raises LockTimeoutError, and any error of `wait.check`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode is None:
        mode = 0o600 | (path.parent.stat().st_mode & stat.S_IRGRP)
    began, waiting = time.monotonic(), False
    while True:
        fd = _open(path, mode)
        try:
            while not _try_lock(fd, shared):
                if not waiting:
                    waiting = True
                    wait.on_wait(lock_holder(path))
                if time.monotonic() - began > wait.limit_s:
                    raise _timeout_error(path, wait)
                wait.check()
                time.sleep(_POLL_S)
            if not _is_file_at(fd, path):  # removed during the wait: we locked another file
                continue
            token, now = "" if shared else secrets.token_hex(8), datetime.now(UTC).isoformat(timespec="seconds")
            _write_holder(fd, Holder(token, platform.node(), os.getpid(), user_name(), run, now))
            yield Lock(path, fd, token)
            return
        finally:
            os.close(fd)


def is_locked(path: Path) -> bool:
    """Return whether a living process holds the lock. A lock file that we may not read counts as locked.

    Writes nothing, so it also works in a read-only store.
    """
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    except PermissionError:
        return True
    try:
        return not _try_lock(fd, shared=True)
    finally:
        os.close(fd)


def lock_holder(path: Path) -> Holder | None:
    """Return who took the lock last; None if nobody did or the note cannot be read."""
    try:
        return _parse_holder(path.read_bytes())
    except OSError:
        return None


def _open(path: Path, mode: int) -> int:
    """Open the lock file, creating it if need be. Links are not followed: anybody may write to the folder."""
    try:  # in a protected /tmp, O_CREAT of another user's file is refused
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode)
    with suppress(OSError):  # another user's file
        os.fchmod(fd, mode)
    return fd


def _timeout_error(path: Path, wait: LockWait) -> LockTimeoutError:
    field = f" {wait.limit_field} sets how long to wait." if wait.limit_field else ""
    return LockTimeoutError(
        f"{path}: waited {wait.limit_s / 60:g} minutes for {lock_holder(path) or 'another process'}. Let it end or "
        f"stop it, then run the same command again.{field}"
    )


def _is_file_at(fd: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.stat())
    return False


def _write_holder(fd: int, holder: Holder) -> None:
    note = json.dumps(asdict(holder)).encode()
    os.pwrite(fd, note, 0)
    os.ftruncate(fd, len(note))


def _parse_holder(note: bytes) -> Holder | None:
    try:
        holder = Holder(**json.loads(note[:_NOTE_BYTES]))
        str(holder)  # fails now, not when it is shown
    except (ValueError, TypeError, OverflowError, RecursionError):
        return None
    return holder


def _try_lock(fd: int, shared: bool = False) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def user_name() -> str:
    """Return the name of the user who runs this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())
