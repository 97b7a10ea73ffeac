"""Records in which MLflow servers a home registered versions: only together they know which artifacts are needed."""

from __future__ import annotations

from draftsmith.artifacts.atomic import disk_errors
from draftsmith.artifacts.redaction import redacted
from draftsmith.artifacts.tracking.client import sqlite_file
from draftsmith.artifacts.tracking.runs import Tracking

NOTE = "registered-in"  # file in the home, with one line per MLflow
_AS_THE_RUNS = "Set MLFLOW_TRACKING_URI as it was in those runs"
OWN = "mlflow.db"  # the home's own database, which moves with it


def note_tracker(tracking: Tracking) -> None:
    """Record that versions are registered in this MLflow. Call this before the first one is."""
    if _tracker_name(tracking) not in _noted_trackers(tracking):
        doing = disk_errors("noting where versions are registered:")
        with doing, (tracking.folder / NOTE).open("a", encoding="utf-8") as file:
            file.write(_tracker_name(tracking) + "\n")


def describe_other_trackers(tracking: Tracking) -> str | None:
    """Return why this MLflow does not know all artifacts that lines need, and the remedy; None if it does."""
    noted, here = _noted_trackers(tracking), _tracker_name(tracking)
    if others := sorted(noted - {here}):
        advice = "" if here in noted else f"{_how_to_switch(noted)}. "
        return (
            f"versions were registered in {', '.join(others)}, which {here} does not know. {advice}If those are "
            f"abandoned, remove them from {tracking.folder / NOTE}"
        )
    database = sqlite_file(tracking.uri)
    if not noted and database is not None and not database.is_file():  # another host shares the bucket
        return f"{database} does not exist: runs of this home were tracked elsewhere. {_AS_THE_RUNS}"
    return None


def describe_wrong_tracker(tracking: Tracking) -> str | None:
    """Return where this home registered versions, and the remedy, if none was in this MLflow."""
    noted, here = _noted_trackers(tracking), _tracker_name(tracking)
    if not noted or here in noted:
        return None
    return (
        f"versions of this home were registered in {', '.join(sorted(noted))}, none in {here}. {_how_to_switch(noted)}"
    )


def _how_to_switch(noted: set[str]) -> str:
    return _AS_THE_RUNS if noted != {OWN} else "Unset MLFLOW_TRACKING_URI"


def _noted_trackers(tracking: Tracking) -> set[str]:
    path = tracking.folder / NOTE
    return set(path.read_text("utf-8").splitlines()) if path.is_file() else set()


def _tracker_name(tracking: Tracking) -> str:
    return OWN if tracking.is_default else redacted(tracking.uri)
