"""The end of an attempt whose commit is still to be made: what its manifest will say, in space that is there already.

A stage has ended when this is written: if its commit fails (a full disk, a bucket that does not answer), the next claim
makes it without the stage.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from draftsmith.artifacts.manifest import Manifest, artifact_files

PENDING = "pending.json"  # in the folder of an attempt
_BYTES = 1 << 16  # set aside when the attempt begins, so that a full disk cannot refuse them at its end


class Pending(Manifest):
    """A manifest whose files are not described yet."""

    volatile: tuple[str, ...]
    sizes: dict[str, int]  # of the files that are there, by name


def sizes_of(out: Path) -> dict[str, int]:
    return {name: (out / name).stat().st_size for name in artifact_files(out)}


def set_aside_space(path: Path) -> None:
    with path.open("wb") as file, suppress(OSError):  # some file systems cannot: the bytes are asked for at the end
        os.posix_fallocate(file.fileno(), 0, _BYTES)


def overwrite(path: Path, content: bytes) -> None:
    """In the space that the file has: nothing is asked of a full disk. Lost in a crash, the stage is run again."""
    with path.open("r+b") as file:
        file.write(content)
        file.flush()
        file.truncate()


def read_pending(path: Path) -> Pending | None:
    """None: the stage has not ended."""
    try:
        return Pending.model_validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None
