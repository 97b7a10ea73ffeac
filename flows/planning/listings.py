"""The files that stages list outside the store: a run notes them, so that a continued run reads the same ones."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import EXIT_USER_ERROR, DraftsmithError, TimeLimitError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.identifiers import run_file_name
from draftsmith.stages.runtime.stage import Config, InputListing

_REUSE_S = 3 * 86400.0  # a listing is not reused after this time, so that next week's run makes a new one


def pin_files(config: Config, earlier: InputListing | None) -> tuple[Config, int]:
    """Return a config that reads only the files of a listing, and the number of newer files that it omits.

    earlier: the last run's listing, which is reused if it is of the same config and all its files are there.
    """
    if (now := config.list_files()) is None:
        return config, 0
    listing = earlier if earlier is not None and earlier.serves(now) else now
    return config.with_pinned_files(listing), len(now.files) - len(listing.files)


def read_listings(run: str, *, ended: bool = False) -> dict[str, InputListing]:
    """Return each node's listing in the last run of this name; none if that run has ended.

    ended: return them of an ended run too.
    """
    try:
        note = json.loads(_path(run).read_text("utf-8"))
        current = abs(time.time() - _path(run).stat().st_mtime) <= _REUSE_S
        listings = {node: InputListing(**fields) for node, fields in note["listings"].items()}
        return listings if current and (ended or not note["ended"]) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def note_listings(run: str, listings: Mapping[str, InputListing], *, ended: bool = False) -> None:
    """Note the listings of a run, so that a continued run reads the same files. A failure to write is ignored."""
    if listings and (ended or read_listings(run) != listings):
        text = json.dumps({"ended": ended, "listings": {node: asdict(listing) for node, listing in listings.items()}})
        with contextlib.suppress(DraftsmithError):
            write_text(_path(run), text)


def forget_listings(run: str, error: DraftsmithError) -> None:
    """Make the next run list its files again if the error says that the input was bad."""
    if error.exit_code == EXIT_USER_ERROR and not isinstance(error, TimeLimitError):
        with contextlib.suppress(OSError):
            _path(run).unlink(missing_ok=True)


def _path(run: str) -> Path:
    return home() / "listings" / f"{run_file_name(run)}.json"
