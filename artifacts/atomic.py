"""Atomic writes of files, and clear messages for disk errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from draftsmith.artifacts.errors import from_os_error

TMP_PREFIX = ".tmp-"  # files of a killed process with this prefix never become part of an artifact


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn an OSError of the body into one clear DraftsmithError. doing: a phrase such as "writing x"."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error, doing) from error


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path in the same folder, which replaces `path` if the body ends without an error.

    durable: flush the file and its folder to disk; false for a cache, which may be lost in a crash.
    """
    tmp = path.with_name(f"{TMP_PREFIX}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield tmp
        if durable:
            fsync(tmp)
        tmp.replace(path)
        if durable:
            fsync(path.parent)
    except OSError as error:  # the message names the final file, not the temporary one
        plain = OSError(error.errno, error.strerror) if error.errno else OSError(str(error))
        raise from_os_error(plain, f"writing {path}") from error
    finally:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace the content of `path` atomically."""
    with atomic_path(path, durable=durable) as tmp:
        tmp.write_text(text, encoding="utf-8")


def remove_temporary(folder: Path) -> None:
    """Remove temporary files that killed processes left in a folder."""
    for leftover in folder.rglob(f"{TMP_PREFIX}*"):
        leftover.unlink()


def fsync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
