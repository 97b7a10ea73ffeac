"""What the files outside the store hold that stages read: a part of their keys."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import EXIT_USER_ERROR, DraftsmithError, TimeLimitError
from draftsmith.artifacts.home import home, run_file_name
from draftsmith.artifacts.store.checksums import Checksums
from draftsmith.stages.runtime.stage import SOURCES, Config

log = logging.getLogger(__name__)
_MUCH = 20_000_000_000  # bytes, which even a fast disk takes some time to read


def external_digests(config: Config) -> dict[str, str]:
    """What a config's files outside the store hold: path -> sha256, or a version of what is far away."""
    checksums, files = Checksums(home()), config.external_files()
    if (unread := checksums.uncached_bytes(files)) > _MUCH:
        log.warning(
            "reads %d GB (files outside the store, %d in all) for their checksums, maybe for minutes; what nobody "
            "touches is not read again for a week",
            unread // 10**9,
            len(files),
        )
    return {str(path): checksums.sha256(path) for path in files} | config.external_versions()


_GOES_ON_S = 3 * 86400.0  # next week's run lists anew, whatever became of this week's


def read_listings(run: str, *, ended: bool = False) -> dict[str, str]:
    """Return the key of each node's listing if the run has not ended, or has `ended` too."""
    try:
        note = json.loads(_path(run).read_text("utf-8"))
        current = abs(time.time() - _path(run).stat().st_mtime) <= _GOES_ON_S
        return dict(note["keys"]) if current and (ended or not note["ended"]) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def note_listings(run: str, keys: Mapping[str, str], *, ended: bool = False) -> None:
    """Note the listings of a run that works, or has `ended`. Without the note more is made again."""
    if keys and (ended or read_listings(run) != keys):
        with contextlib.suppress(DraftsmithError):
            write_text(_path(run), json.dumps({"keys": keys, "ended": ended}))


def forget_listings(run: str, error: DraftsmithError) -> None:
    """Have the next run list anew if the error says that the input was bad."""
    if error.exit_code == EXIT_USER_ERROR and not isinstance(error, TimeLimitError):
        with contextlib.suppress(OSError):
            _path(run).unlink(missing_ok=True)


def _path(run: str) -> Path:
    return home() / SOURCES / f"{run_file_name(run)}.json"
