"""Permissions of lock files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from draftsmith.artifacts.locks import locked


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
