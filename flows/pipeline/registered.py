"""Which MLflow a home's runs registered versions in last: it knows which artifacts their drafter lines need."""

from __future__ import annotations

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.redaction import redacted
from draftsmith.artifacts.sqlite import sqlite_file
from draftsmith.artifacts.tracking import Tracking

NOTE = "registered-in"  # file in the home


def note(tracking: Tracking) -> None:
    """Write that versions are registered there."""
    write_text(tracking.folder / NOTE, _name(tracking) + "\n")


def elsewhere(tracking: Tracking) -> str | None:
    """Why this MLflow cannot say what the lines of its home need; None if it can. Connects to none."""
    path = tracking.folder / NOTE
    if path.is_file():
        last = path.read_text("utf-8").strip()
        if last == _name(tracking):
            return None
        return f"versions were last registered in {last or tracking.default_uri}, not in {redacted(tracking.uri)}"
    database = sqlite_file(tracking.uri)
    if database is not None and not database.is_file():  # of a home that is older than the note
        return f"{database} does not exist: runs of this home were tracked elsewhere"
    return None


def _name(tracking: Tracking) -> str:
    """Empty for the home's own database, which moves with it."""
    return "" if tracking.uri == tracking.default_uri else redacted(tracking.uri)
