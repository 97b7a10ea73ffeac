"""Find and mark the refreshes that MLflow knows, by what they made and by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote, urlparse

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.locks import is_locked
from draftsmith.artifacts.store.local import SHORT, Store
from draftsmith.artifacts.store.manifest import ArtifactRef
from draftsmith.artifacts.tracking.runs import HOME, KEY, NOTE, STAGE, Tracking
from draftsmith.artifacts.tracking.terms import end_run, log_metrics, review_files, sanitize_key

_MADE = "made."  # params of a refresh: which artifact each of its nodes is
OUTCOME = "outcome"  # a tag: what a refresh came to
REUSED = "reused"  # a tag: how often a finished refresh was asked for again, and when last
_IS_REFRESH = f"tags.{STAGE} = 'refresh'"


def artifact_params(made: Mapping[str, ArtifactRef]) -> dict[str, str]:
    """Return each node's artifact, by its place in the store and its content."""
    return {
        sanitize_key(f"{_MADE}{name}"): f"{ref.stage}/{ref.key[:SHORT]}#{ref.content_id[:16]}"
        for name, ref in made.items()
    }


def find_refresh(tracking: Tracking, name: str, made: Mapping[str, ArtifactRef]) -> str | None:
    """Return the last finished refresh of that name and experiment that has all these artifacts.

    None if there is none, or MLflow failed.
    """
    wanted = artifact_params(made)
    with tracking.best_effort():
        client, experiment = tracking.connect()
        finished = f"{_name_filter(name)} and {_IS_REFRESH} and attributes.status = 'FINISHED'"
        for run in client.search_runs([experiment], finished, max_results=100):
            if wanted.items() <= run.data.params.items():
                return str(run.info.run_id)
    return None


def mark_reused(tracking: Tracking, run_id: str) -> None:
    """Note of a finished refresh that it was asked for once more, and that everything was there."""
    with tracking.best_effort():
        client, _ = tracking.connect()
        times = int(client.get_run(run_id).data.tags.get(REUSED, "0").partition(" ")[0]) + 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        client.set_tag(run_id, REUSED, f"{times} time{'s' * (times > 1)}, last at {now}")


def record_outcome(
    tracking: Tracking,
    run_id: str,
    made: Mapping[str, ArtifactRef],
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
) -> None:
    """Add to a refresh that has ended without a conclusion (`--until`) what followed later from its very artifacts.

    One that has come to something, or has made more than these, stays as it is.
    """
    with tracking.best_effort():
        client, _ = tracking.connect()
        known = client.get_run(run_id).data
        its_own = {name: value for name, value in known.params.items() if name.startswith(_MADE)}
        if OUTCOME in known.tags or its_own != artifact_params(made) or tags.items() <= known.tags.items():
            return
        log_metrics(client, run_id, [(name, value, 0) for name, value in metrics.items()])
        for name, text in tags.items():
            client.set_tag(run_id, name, text)


def artifact_folders(tracking: Tracking, name: str, node: str) -> dict[str, str]:
    """Return the folder of each artifact of a refresh, by node; empty if there is none.

    name: the id of its run, or its name: the last one then that has made `node`, which not every refresh comes to.
    """
    client, _ = tracking.connect()
    every = [each.experiment_id for each in client.search_experiments()]
    chosen = f"attributes.run_id = '{name}'" if re.fullmatch("[0-9a-f]{32}", name) else _name_filter(name)
    for run in client.search_runs(every, f"{chosen} and {_IS_REFRESH}", max_results=100):
        store = Path(run.data.tags.get(HOME, "").partition(":")[2]) / "store"
        params = run.data.params.items()
        found = {n.removeprefix(_MADE): str(store / v.rsplit("#", 1)[0]) for n, v in params if n.startswith(_MADE)}
        if node in found:
            return found
    return {}


def _name_filter(name: str) -> str:
    quote = '"' if "'" in name else "'"  # MLflow's filters have no other way out
    return f"attributes.run_name = {quote}{name}{quote}"


def close_dead_runs(tracking: Tracking, store: Store) -> list[str]:
    """End the runs of this home whose process is gone; their names are returned.

    As FINISHED where the artifact is complete (MLflow was lost, or the process between the two), else as KILLED. Of
    another host or path (a container that was replaced, a home that was moved) those whose lock lies here, and their
    stages'.
    """
    closed: list[str] = []
    with tracking.best_effort():
        client, _ = tracking.connect()
        every = [each.experiment_id for each in client.search_experiments()]
        gone: set[str] = set()  # refreshes
        running = client.search_runs(every, "attributes.status = 'RUNNING'", max_results=1000)
        ours = [run for run in running if {STAGE, KEY, HOME} <= run.data.tags.keys()]
        for run in sorted(ours, key=lambda run: run.data.tags[STAGE] != "refresh"):
            tags, stage, key = run.data.tags, run.data.tags[STAGE], run.data.tags[KEY]
            lock = tracking.refresh_file(key) if stage == "refresh" else None
            here = lock.exists() if lock is not None else tags.get("mlflow.parentRunId") in gone
            if not here and not tracking.is_local_run(run):
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


def describe_misplaced_files(tracking: Tracking) -> str | None:
    """Of a home that was moved or is a copy: where runs would put files, in words; None if that is in the home, or is
    a server's business."""
    if not tracking.is_default:
        return None
    with tracking.best_effort():
        client, experiment = tracking.connect()
        location = str(client.get_experiment(experiment).artifact_location)
        if location.startswith("file:") and not Path(unquote(urlparse(location).path)).is_relative_to(tracking.folder):
            return (
                f"MLflow puts the files of experiment {tracking.experiment} into {location}, outside of the home "
                f"{tracking.folder}: it was moved, or is a copy; move it back, or begin another experiment "
                "(MLFLOW_EXPERIMENT_NAME)"
            )
    return None
