"""Refreshes that MLflow knows: by what they made, and by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime

from draftsmith.artifacts.manifest import ArtifactRef
from draftsmith.artifacts.mlflow_terms import allowed, log_metrics
from draftsmith.artifacts.tracking import Tracking

_ARTIFACT = "draftsmith.artifact."  # tags of a refresh: folder#content of each node's artifact
OUTCOME = "draftsmith.outcome"  # another tag: what a refresh came to
REUSED_AT, REUSED_TIMES = "draftsmith.reused_at", "draftsmith.reused_times"  # of a refresh that was asked for again
_A_REFRESH = "tags.`draftsmith.stage` = 'refresh'"


def artifact_tags(made: Mapping[str, ArtifactRef]) -> dict[str, str]:
    """Where each node's artifact is, and which content it has."""
    return {allowed(f"{_ARTIFACT}{name}"): f"{ref.path}#{ref.content_id[:16]}" for name, ref in made.items()}


def find_refresh(tracking: Tracking, name: str, made: Mapping[str, ArtifactRef]) -> str | None:
    """The last finished refresh of that name and experiment that has all these artifacts; None too if MLflow failed."""
    tags = artifact_tags(made)
    with tracking.tolerant():
        client, experiment = tracking.connect()
        wanted = f"{_named(name)} and {_A_REFRESH} and attributes.status = 'FINISHED'"
        for run in client.search_runs([experiment], wanted, max_results=100):
            if tags.items() <= run.data.tags.items():
                return str(run.info.run_id)
    return None


def tag_again(tracking: Tracking, run_id: str) -> None:
    """Of a refresh that has ended: it was asked for once more, and everything was there."""
    with tracking.tolerant():
        client, _ = tracking.connect()
        times = int(client.get_run(run_id).data.tags.get(REUSED_TIMES, "0")) + 1
        client.set_tag(run_id, REUSED_TIMES, str(times))
        client.set_tag(run_id, REUSED_AT, datetime.now(UTC).isoformat(timespec="seconds"))


def conclude(
    tracking: Tracking,
    run_id: str,
    made: Mapping[str, ArtifactRef],
    figures: Mapping[str, float],
    tags: Mapping[str, str],
) -> None:
    """Of a refresh that has ended without a conclusion (`--until`): what followed later from its very artifacts.

    One that has come to something, or has made more than these, stays as it is.
    """
    with tracking.tolerant():
        client, _ = tracking.connect()
        known = client.get_run(run_id).data.tags
        its_own = {name: value for name, value in known.items() if name.startswith(_ARTIFACT)}
        if OUTCOME in known or its_own != artifact_tags(made) or tags.items() <= known.items():
            return
        log_metrics(client, run_id, [(name, value, 0) for name, value in figures.items()])
        for name, text in tags.items():
            client.set_tag(run_id, name, text)


def folders_of(tracking: Tracking, name: str, node: str) -> dict[str, str]:
    """Folder of each artifact of a refresh, by node; name: its run's id, or its name: the last one then that has made
    `node`, which not every refresh comes to. Empty if there is none."""
    client, _ = tracking.connect()
    every = [each.experiment_id for each in client.search_experiments()]
    chosen = f"attributes.run_id = '{name}'" if re.fullmatch("[0-9a-f]{32}", name) else _named(name)
    for run in client.search_runs(every, f"{chosen} and {_A_REFRESH}", max_results=100):
        tags = run.data.tags.items()
        found = {n.removeprefix(_ARTIFACT): value.rsplit("#", 1)[0] for n, value in tags if n.startswith(_ARTIFACT)}
        if node in found:
            return found
    return {}


def _named(name: str) -> str:
    quote = '"' if "'" in name else "'"  # MLflow's filters have no other way out
    return f"attributes.run_name = {quote}{name}{quote}"
