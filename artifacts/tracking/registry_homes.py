"""In which MLflows a home's runs registered versions: all of them together know which artifacts drafter lines need."""

from __future__ import annotations

from draftsmith.artifacts.atomic import disk_errors
from draftsmith.artifacts.redaction import redacted
from draftsmith.artifacts.tracking.client import sqlite_file
from draftsmith.artifacts.tracking.runs import Tracking

NOTE = "registered-in"  # file in the home, a line for each
_AS_THE_RUNS = "set MLFLOW_TRACKING_URI as the runs have it"
OWN = "mlflow.db"  # the home's own database, which moves with it


def note_tracker(tracking: Tracking) -> None:
    """Write that versions are registered there, before any is."""
    if _tracker_name(tracking) not in _noted_trackers(tracking):
        doing = disk_errors("noting where versions are registered:")
        with doing, (tracking.folder / NOTE).open("a", encoding="utf-8") as file:
            file.write(_tracker_name(tracking) + "\n")


def describe_other_trackers(tracking: Tracking) -> str | None:
    """Why this MLflow cannot say what the lines of its home need, and what to do; None if it can. Connects to none."""
    noted, here = _noted_trackers(tracking), _tracker_name(tracking)
    if others := sorted(noted - {here}):
        given_up = f"remove from {tracking.folder / NOTE} those that are gone for good or whose lines are given up"
        advice = given_up if here in noted else f"{_how_to_switch(noted)}, or {given_up}"
        return f"versions were registered in {', '.join(others)}, which {here} does not know of; {advice}"
    database = sqlite_file(tracking.uri)
    if not noted and database is not None and not database.is_file():  # another host's, with the same bucket
        return f"{database} does not exist: runs of this home were tracked elsewhere; {_AS_THE_RUNS}"
    return None


def describe_wrong_tracker(tracking: Tracking) -> str | None:
    """Where versions of this home were registered, and what to do, if none was in this MLflow. Connects to none."""
    noted, here = _noted_trackers(tracking), _tracker_name(tracking)
    if not noted or here in noted:
        return None
    return (
        f"versions of this home were registered in {', '.join(sorted(noted))}, none in {here}: {_how_to_switch(noted)}"
    )


def _how_to_switch(noted: set[str]) -> str:
    return _AS_THE_RUNS if noted != {OWN} else "unset MLFLOW_TRACKING_URI"


def _noted_trackers(tracking: Tracking) -> set[str]:
    path = tracking.folder / NOTE
    return set(path.read_text("utf-8").splitlines()) if path.is_file() else set()


def _tracker_name(tracking: Tracking) -> str:
    return OWN if tracking.is_default else redacted(tracking.uri)
