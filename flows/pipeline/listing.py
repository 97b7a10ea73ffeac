"""Which listings of files a run goes on with: those of the last run of its name, until that has come to its end.

More files come while a run works, and a listing made anew would make everything after it again. A note in
`sources/NAME.json` of the home names the artifacts of stage `sources`.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import EXIT_USER_ERROR, DraftsmithError
from draftsmith.artifacts.home import file_name, home
from draftsmith.flows.pipeline.process import PastLimitError
from draftsmith.stages.contract import SOURCES

_GOES_ON_S = 3 * 86400.0  # next week's run lists anew, whatever became of this week's


def held(run: str, *, ended: bool = False) -> dict[str, str]:
    """Return the key of each node's listing if the run has not ended, or has `ended` too."""
    try:
        note = json.loads(_path(run).read_text("utf-8"))
        current = abs(time.time() - _path(run).stat().st_mtime) <= _GOES_ON_S
        return dict(note["keys"]) if current and (ended or not note["ended"]) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def hold(run: str, keys: Mapping[str, str], *, ended: bool = False) -> None:
    """Note the listings of a run that works, or has `ended`. Without the note more is made again."""
    if keys and (ended or held(run) != keys):
        with contextlib.suppress(DraftsmithError):
            write_text(_path(run), json.dumps({"keys": keys, "ended": ended}))


def forget(run: str, error: DraftsmithError) -> None:
    """Have the next run list anew if the error says that the input was bad."""
    if error.exit_code == EXIT_USER_ERROR and not isinstance(error, PastLimitError):
        with contextlib.suppress(OSError):
            _path(run).unlink(missing_ok=True)


def _path(run: str) -> Path:
    return home() / SOURCES / f"{file_name(run)}.json"
