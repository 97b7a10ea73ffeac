"""Files that appear whole or not at all, and disk errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from draftsmith.artifacts.errors import from_os_error

TMP_PREFIX = ".tmp-"  # what a killed process leaves behind under this prefix never becomes part of an artifact


@contextmanager
def disk_errors(doing: str) -> Iterator[None]:
    """Turn an `OSError` of the body into one clear `DraftsmithError`; `doing` is a phrase such as 'writing x'."""
    try:
        yield
    except OSError as error:
        raise from_os_error(error, doing) from error


@contextmanager
def atomic_path(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary sibling to write to, which takes the place of `path` when the body ends without an error.

    durable: it is on the disk then; false for a cache, which may be lost with the machine.
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
    except OSError as error:  # named after the file that was meant, not after the temporary one
        plain = OSError(error.errno, error.strerror) if error.errno else OSError(str(error))
        raise from_os_error(plain, f"writing {path}") from error
    finally:
        with suppress(OSError):
            tmp.unlink(missing_ok=True)


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Replace the content of `path` in one step."""
    with atomic_path(path, durable=durable) as tmp:
        tmp.write_text(text, encoding="utf-8")


def remove_temporary(folder: Path) -> None:
    """Remove what processes that were killed have left in a folder."""
    for leftover in folder.rglob(f"{TMP_PREFIX}*"):
        leftover.unlink()


def fsync(path: Path) -> None:
    """Bring a file's content, or a folder's entries, to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
