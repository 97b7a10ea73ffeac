"""File locks that the kernel drops when their holder dies, with a note of who holds them.

On one machine the kernel tells truly who lives. On a file system that several machines share it may not: a server that
starts again, or a lease that runs out, frees the lock of a holder that is only slow. Every holder therefore writes a
token of its own into the lock file, and checks before it makes anything final that it still stands there
(`Lock.check`): a holder that was thought dead cannot write.
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

OTHERS_LIMIT_S = 600.0  # a database that is migrated, a server that starts
_POLL_S = 0.2
_CHECK_EVERY_S = 10.0
_NOTE_BYTES = 4096


@dataclass(frozen=True)
class Holder:
    """Who took a lock, and when."""

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
    """The holder of a lock did not let it go in time."""


class LockLostError(DraftsmithError):
    """Another process took the lock over: what this one made must not become final."""


@dataclass(frozen=True)
class Lock:
    """A lock that is held as long as the last process that has its descriptor lives."""

    path: Path
    fd: int
    token: str  # empty where the lock is shared by several
    _checked: list[float] = field(default_factory=lambda: [time.monotonic()])  # when, last

    def check(self) -> None:
        """Raise LockLostError if the file names another holder by now, or is gone."""
        try:  # by its name: a lock file that was removed and made again is another one
            found = _holder(self.path.read_bytes())
        except FileNotFoundError:
            found = None
        except OSError as error:
            raise RetryableError(f"{self.path}: cannot be read ({error.strerror}): is the disk there?") from error
        if found is None or found.token != self.token:
            by = str(found) if found is not None else "nobody that left a name"
            raise LockLostError(
                f"{self.path}: the lock was taken over by {by}, while this run was thought dead: what this one made is "
                "not kept; run the same command again, which waits for the other"
            )

    def check_now_and_then(self) -> None:
        """`check`, at most every few seconds: for a holder that works for hours."""
        if time.monotonic() - self._checked[0] > _CHECK_EVERY_S:
            self._checked[0] = time.monotonic()
            self.check()


@contextmanager
def locked(
    path: Path,
    waiting: Callable[[Holder | None], None] | None = None,
    *,
    run: str = "",
    limit_s: float = OTHERS_LIMIT_S,
    limit_field: str = "",
    shared: bool = False,
    mode: int | None = None,
    check: Callable[[], None] = lambda: None,
) -> Iterator[Lock]:
    """Hold the lock file's lock, after waiting for its holder.

    There is no unlocking: the lock goes when the last process that has the descriptor closes it or dies, so a child
    that inherits it keeps the lock as long as it lives. `waiting` is called once if another process holds the lock,
    with who that is. `run` is told to those who wait for us. Raises LockTimeoutError after `limit_s`, which the field
    `limit_field` of the config says, and what `check` raises, which is called while it waits. `shared`: others may hold
    it too, unless one holds it alone. `mode`: of the file, whatever the umask; left out, the folder's group may read
    it, to see that it is held, if it may read the folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if mode is None:
        mode = 0o600 | (path.parent.stat().st_mode & stat.S_IRGRP)
    began = time.monotonic()
    while True:
        fd = _open(path, mode)
        try:
            while not _try_lock(fd, shared):
                if tell := waiting:
                    waiting = None
                    tell(holder_of(path))
                if time.monotonic() - began > limit_s:
                    raise _waited(path, limit_s, limit_field)
                check()
                time.sleep(_POLL_S)
            if not _is(fd, path):  # removed while we waited: the lock is another file's
                continue
            token = "" if shared else secrets.token_hex(8)
            _write_holder(fd, Holder(token, platform.node(), os.getpid(), user_name(), run, _now()))
            yield Lock(path, fd, token)
            return
        finally:
            os.close(fd)


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock, as far as we can see: one that we may not read counts as held.

    Changes nothing, so it may be asked of a store that we only read.
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


def holder_of(path: Path) -> Holder | None:
    """Who took the lock last; None if nobody did, or left no name."""
    try:
        return _holder(path.read_bytes())
    except OSError:
        return None


def _open(path: Path, mode: int) -> int:
    """A link is not followed: the folder may be open to all."""
    try:  # where /tmp is protected, O_CREAT of another user's file is refused
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    except FileNotFoundError:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, mode)
    with suppress(OSError):  # another user's
        os.fchmod(fd, mode)
    return fd


def _waited(path: Path, limit_s: float, field: str) -> LockTimeoutError:
    return LockTimeoutError(
        f"{path}: waited {limit_s / 60:g} minutes for {holder_of(path) or 'another process'}: let it end or stop it, "
        f"then run the same command again{f' ({field} says how long to wait)' if field else ''}"
    )


def _is(fd: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(fd), path.stat())
    return False


def _write_holder(fd: int, holder: Holder) -> None:
    note = json.dumps(asdict(holder)).encode()
    os.pwrite(fd, note, 0)
    os.ftruncate(fd, len(note))


def _holder(note: bytes) -> Holder | None:
    try:
        return Holder(**json.loads(note[:_NOTE_BYTES]))
    except (ValueError, TypeError):
        return None


def _try_lock(fd: int, shared: bool = False) -> bool:
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def user_name() -> str:
    """Of whoever runs this process."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        return str(os.getuid())
