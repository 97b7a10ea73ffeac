"""Lock files: their permissions, and notes of their holders that cannot be read."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from draftsmith.artifacts.locks import LockTimeoutError, LockWait, lock_holder, locked


@pytest.mark.parametrize(("folder", "mode"), [(0o700, 0o600), (0o750, 0o640)])
def test_whoever_can_read_the_folder_can_read_the_lock_file(folder: int, mode: int, tmp_path: Path) -> None:
    """New lock files and existing ones get the same mode."""
    tmp_path.chmod(folder)
    before = os.umask(0o077)
    try:
        for lock in (tmp_path / "new", tmp_path / "old"):
            if lock.name == "old":
                lock.touch()
            with locked(lock):
                assert lock.stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


HOLDER = {"token": "1", "host": "h", "pid": 1, "user": "u", "run": ""}


@pytest.mark.parametrize(
    "note",
    [
        *(json.dumps(HOLDER | {"since": since}) for since in ("yesterday", "", 5, None, "0001-01-01T00:00:00+23:00")),
        "[" * 4096,
        "\xff",
    ],
)
def test_a_note_that_cannot_be_shown_names_nobody(note: str, tmp_path: Path) -> None:
    """Such as one of another user, who may write what he likes to a lock in a shared folder."""
    with (tmp_path / "lock").open("w") as theirs:
        fcntl.flock(theirs, fcntl.LOCK_EX)
        theirs.write(note)
        theirs.flush()
        assert lock_holder(tmp_path / "lock") is None
        with (
            pytest.raises(LockTimeoutError, match="minutes for another process"),
            locked(tmp_path / "lock", wait=LockWait(0)),
        ):
            pass
