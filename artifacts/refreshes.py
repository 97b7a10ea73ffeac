"""Find and mark the refreshes that MLflow knows, by what they made and by name."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from draftsmith.artifacts.manifest import ArtifactRef
from draftsmith.artifacts.mlflow_terms import allowed, log_metrics
from draftsmith.artifacts.store import SHORT
from draftsmith.artifacts.tracking import HOME, STAGE, Tracking

_MADE = "made."  # params of a refresh: which artifact each of its nodes is
OUTCOME = "outcome"  # a tag: what a refresh came to
REUSED = "reused"  # a tag: how often a finished refresh was asked for again, and when last
_A_REFRESH = f"tags.{STAGE} = 'refresh'"


def artifact_params(made: Mapping[str, ArtifactRef]) -> dict[str, str]:
    """Return each node's artifact, by its place in the store and its content."""
    return {
        allowed(f"{_MADE}{name}"): f"{ref.stage}/{ref.key[:SHORT]}#{ref.content_id[:16]}" for name, ref in made.items()
    }


def find_refresh(tracking: Tracking, name: str, made: Mapping[str, ArtifactRef]) -> str | None:
    """Return the last finished refresh of that name and experiment that has all these artifacts.

    None if there is none, or MLflow failed.
    """
    wanted = artifact_params(made)
    with tracking.tolerant():
        client, experiment = tracking.connect()
        finished = f"{_named(name)} and {_A_REFRESH} and attributes.status = 'FINISHED'"
        for run in client.search_runs([experiment], finished, max_results=100):
            if wanted.items() <= run.data.params.items():
                return str(run.info.run_id)
    return None


def tag_again(tracking: Tracking, run_id: str) -> None:
    """Note of a finished refresh that it was asked for once more, and that everything was there."""
    with tracking.tolerant():
        client, _ = tracking.connect()
        times = int(client.get_run(run_id).data.tags.get(REUSED, "0").partition(" ")[0]) + 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        client.set_tag(run_id, REUSED, f"{times} time{'s' * (times > 1)}, last at {now}")


def conclude(
    tracking: Tracking,
    run_id: str,
    made: Mapping[str, ArtifactRef],
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
) -> None:
    """Add to a refresh that has ended without a conclusion (`--until`) what followed later from its very artifacts.

    One that has come to something, or has made more than these, stays as it is.
    """
    with tracking.tolerant():
        client, _ = tracking.connect()
        known = client.get_run(run_id).data
        its_own = {name: value for name, value in known.params.items() if name.startswith(_MADE)}
        if OUTCOME in known.tags or its_own != artifact_params(made) or tags.items() <= known.tags.items():
            return
        log_metrics(client, run_id, [(name, value, 0) for name, value in metrics.items()])
        for name, text in tags.items():
            client.set_tag(run_id, name, text)


def folders_of(tracking: Tracking, name: str, node: str) -> dict[str, str]:
    """Return the folder of each artifact of a refresh, by node; empty if there is none.

    name: the id of its run, or its name: the last one then that has made `node`, which not every refresh comes to.
    """
    client, _ = tracking.connect()
    every = [each.experiment_id for each in client.search_experiments()]
    chosen = f"attributes.run_id = '{name}'" if re.fullmatch("[0-9a-f]{32}", name) else _named(name)
    for run in client.search_runs(every, f"{chosen} and {_A_REFRESH}", max_results=100):
        store = Path(run.data.tags.get(HOME, "").partition(":")[2]) / "store"
        params = run.data.params.items()
        found = {n.removeprefix(_MADE): str(store / v.rsplit("#", 1)[0]) for n, v in params if n.startswith(_MADE)}
        if node in found:
            return found
    return {}


def _named(name: str) -> str:
    quote = '"' if "'" in name else "'"  # MLflow's filters have no other way out
    return f"attributes.run_name = {quote}{name}{quote}"
