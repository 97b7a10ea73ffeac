"""Show compared drafters as MLflow's logged models, with metrics by data set, and link registered versions to them.

A drafter is known by the checksum of its weights: the champion of this week is the `opd` of an earlier one, and gets
the metrics of every comparison that it was in.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from draftsmith.artifacts.store.manifest import Manifest
from draftsmith.artifacts.tracking.registry import Version
from draftsmith.artifacts.tracking.runs import Tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel

ALL = ""  # the data set that is all of them together
_WEIGHTS, _FILE = "weights", "drafter/model.safetensors"
_DIGEST_CHARS = 36
Metrics = Mapping[str, Mapping[str, float]]  # data set -> name -> value


def log_models(
    tracking: Tracking, evaluation: Manifest, run_id: str | None, drafters: Mapping[str, tuple[Manifest, Metrics]]
) -> None:
    """Log each compared drafter, unless this evaluation's metrics are there.

    run_id: of the refresh, for an evaluation that has no run of its own. drafters: by name; what made it, and metrics.
    """
    from mlflow.entities import Metric

    run_id = evaluation.mlflow_run_id or run_id
    digest = evaluation.inputs["trajectories"].content_id[:_DIGEST_CHARS]
    with tracking.best_effort():
        client, experiment = tracking.connect()
        for name, (made, metrics) in drafters.items() if run_id is not None else ():
            model = _find(client, experiment, made) or _create(client, experiment, name, made)
            if any(each.run_id == run_id for each in model.metrics or ()):
                continue
            # MLflow keeps one value of a name and a millisecond, and takes the last one where no data set is asked for
            sets, now = sorted(metrics, key=lambda each: each == ALL), int(time.time() * 1000)
            points = [
                Metric(key, value, now + place, 0, model.model_id, each or None, digest if each else None)
                for place, each in enumerate(sets)
                for key, value in metrics[each].items()
            ]
            client.log_batch(run_id, metrics=points)


def link_version(tracking: Tracking, version: Version, made: Manifest) -> None:
    """Have a registered version and its logged model name each other."""
    with tracking.best_effort():
        client, experiment = tracking.connect()
        if (model := _find(client, experiment, made)) is None:
            return
        page = f"[Metrics by prompt set](#/experiments/{experiment}/models/{model.model_id})"
        client.update_model_version(version.line, str(version.number), f"{version.tags['decision']}\n\n{page}")
        client.set_model_version_tag(version.line, str(version.number), "draftsmith.model_id", model.model_id)
        known = json.loads((model.tags or {}).get("mlflow.modelVersions", "[]"))
        here = {"name": version.line, "version": str(version.number)}
        if here not in known:
            client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": json.dumps([*known, here])})


def _find(client: MlflowClient, experiment: str, made: Manifest) -> LoggedModel | None:
    wanted = f"params.{_WEIGHTS} = '{made.files[_FILE].sha256}'"
    found = client.search_logged_models([experiment], wanted, max_results=1)
    return found[0] if found else None


def _create(client: MlflowClient, experiment: str, name: str, made: Manifest) -> LoggedModel:
    params = {_WEIGHTS: made.files[_FILE].sha256, "stage": made.stage, "key": made.key, "content_id": made.content_id}
    model = client.create_logged_model(
        experiment,
        name=re.sub("[/:.%\"']", "_", name),
        source_run_id=made.mlflow_run_id,
        tags={"mlflow.model.isExternal": "true"},  # the store has its files
        params=params,
        model_type="drafter",
    )
    return client.finalize_logged_model(model.model_id, "READY")
