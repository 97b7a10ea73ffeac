"""Lists the files that prompts or logs are read from, and where their time windows begin.

A run lists them once, when it plans. A run that continues after an interruption reads the same files even if more have
arrived.
"""

from __future__ import annotations

import glob
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from draftsmith.stages.data.row_files import canonical_name, is_remote, match_files
from draftsmith.stages.data.time_window import is_relative, resolve_window
from draftsmith.stages.runtime.stage import InputListing


def list_files(paths: Sequence[str], field: str, windows: Iterable[str | None]) -> InputListing | None:
    """Return the files that exist now, and when the windows begin now; None if both are the same in every run.

    paths: files, folders, patterns and addresses. field: the config field that names them, for errors. windows: texts
    such as 7d. Raises DraftsmithError for a pattern that matches nothing, RetryableError for a bucket that does not
    answer.
    """
    relative = sorted({window for window in windows if window is not None and is_relative(window)})
    if not relative and not any(_may_change(path) for path in paths):
        return None
    now = datetime.now(UTC)
    files = sorted({canonical_name(name) for name in match_files(paths, field)})
    return InputListing(list(paths), files, {window: resolve_window(window, now) for window in relative})


def _may_change(path: str) -> bool:
    """Return whether the path may mean other files in another run."""
    return is_remote(path) or glob.has_magic(path) or Path(path.removeprefix("file://")).expanduser().is_dir()
