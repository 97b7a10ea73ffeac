"""Where MLflow puts the files of runs."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlparse

from draftsmith.artifacts.tracking import Tracking


def misplaced(tracking: Tracking) -> str | None:
    """Of a home that was moved or is a copy: where runs would put files, in words; None if that is in the home, or is
    a server's business."""
    if not tracking.is_own:
        return None
    with tracking.tolerant():
        client, experiment = tracking.connect()
        location = str(client.get_experiment(experiment).artifact_location)
        if location.startswith("file:") and not Path(unquote(urlparse(location).path)).is_relative_to(tracking.folder):
            return (
                f"MLflow puts the files of experiment {tracking.experiment} into {location}, outside of the home "
                f"{tracking.folder}: it was moved, or is a copy; move it back, or begin another experiment "
                "(MLFLOW_EXPERIMENT_NAME)"
            )
    return None
