"""Runs that MLflow shows as running although their process is gone: killed, or its container was replaced."""

from __future__ import annotations

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.locks import is_locked
from draftsmith.artifacts.manifest import ArtifactRef
from draftsmith.artifacts.mlflow_terms import end_run, review_files
from draftsmith.artifacts.store import Store
from draftsmith.artifacts.tracking import HOME, KEY, NOTE, STAGE, Tracking


def close_dead_runs(tracking: Tracking, store: Store) -> list[str]:
    """End the runs of this home whose process is gone; their names are returned.

    As FINISHED where the artifact is complete (MLflow was lost, or the process between the two), else as KILLED. Of
    another host or path (a container that was replaced, a home that was moved) those whose lock lies here, and their
    stages'.
    """
    closed: list[str] = []
    with tracking.tolerant():
        client, _ = tracking.connect()
        every = [each.experiment_id for each in client.search_experiments()]
        gone: set[str] = set()  # refreshes
        running = client.search_runs(every, "attributes.status = 'RUNNING'", max_results=1000)
        ours = [run for run in running if {STAGE, KEY, HOME} <= run.data.tags.keys()]
        for run in sorted(ours, key=lambda run: run.data.tags[STAGE] != "refresh"):
            tags, stage, key = run.data.tags, run.data.tags[STAGE], run.data.tags[KEY]
            lock = tracking.refresh_file(key) if stage == "refresh" else None
            here = lock.exists() if lock is not None else tags.get("mlflow.parentRunId") in gone
            if not here and not tracking.is_of_here(run):
                continue
            held = is_locked(lock) if lock is not None else store.is_claimed(stage, key)
            if held or client.get_run(run.info.run_id).info.status != "RUNNING":  # it has ended since the search
                continue
            client.set_tag(run.info.run_id, NOTE, "Closed by a later run: its process was gone.")
            ref = None if stage == "refresh" else _made_by(run.info.run_id, store, stage, key)
            if ref is None:
                client.set_terminated(run.info.run_id, "KILLED")
            else:
                end_run(client, run.info.run_id, "FINISHED", store.manifest(ref).metrics, review_files(ref.path))
            closed.append(run.info.run_name)
            gone.add(run.info.run_id)
    return closed


def _made_by(run_id: str, store: Store, stage: str, key: str) -> ArtifactRef | None:
    """The complete artifact of a key, if this run made it: a forced one that was killed leaves an older one there."""
    try:
        ref = store.find(stage, key)
        return ref if ref is not None and store.manifest(ref).mlflow_run_id == run_id else None
    except DraftsmithError:
        return None
