"""Files outside the store that stages read: their checksums, which are part of cache keys, and their listings."""

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
_MANY_BYTES = 20_000_000_000  # which take even a fast disk some time to read
_REUSE_S = 3 * 86400.0  # a listing is not reused after this time, so that next week's run makes a new one


def external_digests(config: Config) -> dict[str, str]:
    """Return the content of a config's files outside the store: path -> sha256, or the version of a remote file."""
    checksums, files = Checksums(home()), config.external_files()
    if (unread := checksums.uncached_bytes(files)) > _MANY_BYTES:
        log.warning(
            "Reading %d GB for the checksums of %d files outside the store, maybe for minutes. Unchanged files are not "
            "read again for a week.",
            unread // 10**9,
            len(files),
        )
    return {str(path): checksums.sha256(path) for path in files} | config.external_versions()


def read_listings(run: str, *, ended: bool = False) -> dict[str, str]:
    """Return the key of each node's listing in the last run of this name, if it has not ended.

    ended: also if it has ended.
    """
    try:
        note = json.loads(_path(run).read_text("utf-8"))
        current = abs(time.time() - _path(run).stat().st_mtime) <= _REUSE_S
        return dict(note["keys"]) if current and (ended or not note["ended"]) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def note_listings(run: str, keys: Mapping[str, str], *, ended: bool = False) -> None:
    """Note the listings of a run, so that a continued run reads the same files. A failure to write is ignored."""
    if keys and (ended or read_listings(run) != keys):
        with contextlib.suppress(DraftsmithError):
            write_text(_path(run), json.dumps({"keys": keys, "ended": ended}))


def forget_listings(run: str, error: DraftsmithError) -> None:
    """Make the next run list its files again if the error says that the input was bad."""
    if error.exit_code == EXIT_USER_ERROR and not isinstance(error, TimeLimitError):
        with contextlib.suppress(OSError):
            _path(run).unlink(missing_ok=True)


def _path(run: str) -> Path:
    return home() / SOURCES / f"{run_file_name(run)}.json"
