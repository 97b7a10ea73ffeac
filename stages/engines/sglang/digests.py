"""What a server's folders hold, where they are this machine's: digests, computed once while files stay as they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path

from draftsmith.stages.drafters.digest import DIGESTED, drafter_digest
from draftsmith.stages.targets.info import model_digest
from draftsmith.stages.targets.source import weight_files

_LOCK = threading.Lock()  # of several servers that are checked at once, one reads
_KNOWN: dict[tuple[tuple[Path, int, int], ...], str] = {}  # by path, size in bytes and time of the last change in ns


def served_model_digest(folder: Path) -> str | None:
    """Of config and weights; None where there is no such folder, or none that may be read."""
    try:
        if not folder.is_dir():
            return None
        weights = weight_files(folder)
        return _once([folder / "config.json", *weights], lambda: model_digest(folder, weights))
    except OSError:
        return None


def served_drafter_digest(folder: Path) -> str | None:
    """The same of a drafter."""
    try:
        if not folder.is_dir():
            return None
        return _once([folder / name for name in DIGESTED if (folder / name).exists()], lambda: drafter_digest(folder))
    except OSError:
        return None


def _once(files: Sequence[Path], digest: Callable[[], str]) -> str:
    with _LOCK:
        states = [(path, path.stat()) for path in files]
        key = tuple((path, state.st_size, state.st_mtime_ns) for path, state in states)
        if key not in _KNOWN:
            _KNOWN[key] = digest()
        return _KNOWN[key]
