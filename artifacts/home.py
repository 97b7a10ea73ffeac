"""The home (the folder of everything that Draftsmith makes) and its permissions.

Production logs contain other people's text. So only the owner may read the home (0700, files 0600), or also its group
(0750, files 0640) if the config allows it. This is done by the umask, which stage processes, servers and libraries
inherit.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError

OWNER_ONLY, GROUP_READABLE = 0o077, 0o027  # umasks
_start_umask: int | None = None  # the umask that the command was started with
UPLOADED = "uploaded"  # folder in the home: drafters and reports from MLflow; a drafter is touched at every use


def home() -> Path:
    """Return the absolute path of the home: `DRAFTSMITH_HOME`, or `.draftsmith` in the working directory.

    Raises DraftsmithError if the path cannot be a home.
    """
    path = Path(os.environ.get("DRAFTSMITH_HOME") or ".draftsmith")
    try:
        path = path.expanduser().resolve()
    except (RuntimeError, OSError) as error:  # no such user, or a loop of links
        raise DraftsmithError(f"DRAFTSMITH_HOME {path}: {error}. Correct the variable.") from error
    if bad := [character for character in "?%" if character in str(path)]:
        raise DraftsmithError(
            f"{path}: the address of MLflow's database cannot contain {bad[0]}. Set DRAFTSMITH_HOME to a path without "
            "it."
        )
    return path


def open_0600(path: str, flags: int) -> int:
    """Open a file as an `opener` for `open`; a new file gets mode 0600, whatever the umask."""
    return os.open(path, flags, 0o600)


@contextmanager
def home_umask(home: Path) -> Iterator[None]:
    """Set the umask in the body so that whoever may read the home may read new files in it."""
    global _start_umask
    readable = home.is_dir() and bool(home.stat().st_mode & stat.S_IRGRP)
    before = os.umask(GROUP_READABLE if readable else OWNER_ONLY)
    outermost = _start_umask is None
    if outermost:
        _start_umask = before
    try:
        yield
    finally:
        os.umask(before)
        if outermost:
            _start_umask = None


def protect_home(home: Path, *, group_may_read: bool) -> None:
    """Set the permissions of the home, and the umask of this process: owner only, or readable by the group."""
    umask = GROUP_READABLE if group_may_read else OWNER_ONLY
    os.umask(umask)
    home.mkdir(parents=True, exist_ok=True)
    mode = stat.S_IMODE(home.stat().st_mode)
    new_mode = (mode & ~0o777) | (0o777 & ~umask)
    if mode != new_mode:
        with suppress(PermissionError):  # another user's home
            home.chmod(new_mode)


def apply_user_umask(folder: Path) -> None:
    """Give a copy from the home the permissions of files that the user creates."""
    umask = 0o022 if _start_umask is None else _start_umask
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
