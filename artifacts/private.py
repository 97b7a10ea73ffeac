"""Who may read what is made here: the answers of a production log are other people's text.

The home is for its owner alone (0700, files 0600), or its group may read it (0750, files 0640) where the config says
so. The umask does it: stage processes, servers and libraries inherit it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

OWNER_ALONE, GROUP_READS = 0o077, 0o027  # umasks
_user: int | None = None  # the umask that the command was started with


def private(path: str, flags: int) -> int:
    """An `opener` for `open`: what it makes is for its owner alone, whatever the umask."""
    return os.open(path, flags, 0o600)


@contextmanager
def private_files(home: Path) -> Iterator[None]:
    """What the block makes may be read by those who may read the home; the umask is the old one again behind it."""
    global _user
    readable = home.is_dir() and bool(home.stat().st_mode & stat.S_IRGRP)
    before = os.umask(GROUP_READS if readable else OWNER_ALONE)
    outermost = _user is None
    if outermost:
        _user = before
    try:
        yield
    finally:
        os.umask(before)
        if outermost:
            _user = None


def protect(home: Path, *, group_may_read: bool) -> None:
    """Make the home for its owner alone, or readable by its group; and from here on what this process makes."""
    umask = GROUP_READS if group_may_read else OWNER_ALONE
    os.umask(umask)
    home.mkdir(parents=True, exist_ok=True)
    mode = stat.S_IMODE(home.stat().st_mode)
    wanted = (mode & ~0o777) | (0o777 & ~umask)
    if mode != wanted:
        with suppress(PermissionError):  # somebody else's
            home.chmod(wanted)


def users_umask() -> int:
    """For what is none of the home's: files that are copied out of it, and what a command of the user makes."""
    return 0o022 if _user is None else _user


def for_users(folder: Path) -> None:
    """What was copied out of the home gets the modes that its user gives to new files."""
    umask = users_umask()
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
