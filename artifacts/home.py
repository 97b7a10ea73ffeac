"""The home, where everything that Draftsmith makes is kept, and who may read it.

Answers of a production log are other people's text: the home is for its owner alone (0700, files 0600), or its group
may read it (0750, files 0640) where the config says so. The umask does it: stage processes, servers and libraries
inherit it.
"""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from draftsmith.artifacts.errors import DraftsmithError

OWNER_ONLY, GROUP_READABLE = 0o077, 0o027  # umasks
_user: int | None = None  # the umask that the command was started with
_LONGEST = 200  # bytes of a file's name, of 255 that file systems take: an ending comes, and a mark while it is written
UPLOADED = "uploaded"  # in it: copies of drafters that MLflow has, touched whenever one is used


def home() -> Path:
    """Return the absolute folder of the store and of MLflow's database: `DRAFTSMITH_HOME`, or `.draftsmith` here.

    Raises DraftsmithError for one that cannot be.
    """
    path = Path(os.environ.get("DRAFTSMITH_HOME") or ".draftsmith")
    try:
        path = path.expanduser().resolve()
    except (RuntimeError, OSError) as error:  # no such user, or links in a circle
        raise DraftsmithError(f"DRAFTSMITH_HOME {path}: {error}: correct it") from error
    if bad := [sign for sign in "?%" if sign in str(path)]:
        raise DraftsmithError(
            f"{path}: a home's path with {bad[0]} is another in the address of MLflow's database: set DRAFTSMITH_HOME"
        )
    return path


def run_file_name(name: str) -> str:
    """Return the name of a file that belongs to a run of this name, without its ending: another run, another file."""
    quoted = quote(name, safe="")
    if len(quoted) <= _LONGEST:
        return quoted
    return f"{quoted[: _LONGEST - 33]}-{hashlib.sha256(name.encode()).hexdigest()[:32]}"


def open_0600(path: str, flags: int) -> int:
    """Open a file as an `opener` of `open`: a new one is for its owner alone, whatever the umask."""
    return os.open(path, flags, 0o600)


@contextmanager
def home_umask(home: Path) -> Iterator[None]:
    """Let those who may read the home read what the block makes; the umask is restored after it."""
    global _user
    readable = home.is_dir() and bool(home.stat().st_mode & stat.S_IRGRP)
    before = os.umask(GROUP_READABLE if readable else OWNER_ONLY)
    outermost = _user is None
    if outermost:
        _user = before
    try:
        yield
    finally:
        os.umask(before)
        if outermost:
            _user = None


def protect_home(home: Path, *, group_may_read: bool) -> None:
    """Make the home for its owner alone, or readable by its group; and from here on what this process makes."""
    umask = GROUP_READABLE if group_may_read else OWNER_ONLY
    os.umask(umask)
    home.mkdir(parents=True, exist_ok=True)
    mode = stat.S_IMODE(home.stat().st_mode)
    wanted = (mode & ~0o777) | (0o777 & ~umask)
    if mode != wanted:
        with suppress(PermissionError):  # somebody else's
            home.chmod(wanted)


def user_umask() -> int:
    """Return the umask of files outside the home: copies from it, and what a command of the user makes."""
    return 0o022 if _user is None else _user


def apply_user_umask(folder: Path) -> None:
    """Give what was copied out of the home the modes that its user gives to new files."""
    umask = user_umask()
    for path in (folder, *folder.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)
