"""Files that other users of the machine may not read."""

from __future__ import annotations

import os


def private(path: str, flags: int) -> int:
    """An `opener` for `open`: what it makes is for its owner alone, whatever the umask."""
    return os.open(path, flags, 0o600)
