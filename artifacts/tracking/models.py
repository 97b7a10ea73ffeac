"""Compared drafters as MLflow's logged models, with metrics by data set and links from registered versions.

A drafter is identified by the checksum of its weights: this week's champion is the `opd` of an earlier refresh, and
gets the metrics of every comparison that it was in.
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

ALL = ""  # stands for all data sets together
_WEIGHTS, _FILE = "weights", "drafter/model.safetensors"
_DIGEST_CHARS = 36
Metrics = Mapping[str, Mapping[str, float]]  # data set -> name -> value


def log_models(
    tracking: Tracking, evaluation: Manifest, run_id: str | None, drafters: Mapping[str, tuple[Manifest, Metrics]]
) -> None:
    """Log each compared drafter as a model, unless it has this evaluation's metrics already.

    run_id: of the refresh, for an evaluation without a run. drafters: name -> manifest of the drafter, and its metrics.
    """
    from mlflow.entities import Metric  # here: importing mlflow takes seconds

    run_id = evaluation.mlflow_run_id or run_id
    digest = evaluation.inputs["trajectories"].content_id[:_DIGEST_CHARS]
    with tracking.best_effort():
        client, experiment = tracking.connect()
        for name, (drafter, metrics) in drafters.items() if run_id is not None else ():
            model = _find(client, experiment, drafter) or _create(client, experiment, name, drafter)
            if any(metric.run_id == run_id for metric in model.metrics or ()):
                continue
            # MLflow keeps one value per name and millisecond, and shows the last one if no data set is chosen.
            datasets, now = sorted(metrics, key=lambda name: name == ALL), int(time.time() * 1000)
            points = [
                Metric(key, value, now + index, 0, model.model_id, dataset or None, digest if dataset else None)
                for index, dataset in enumerate(datasets)
                for key, value in metrics[dataset].items()
            ]
            client.log_batch(run_id, metrics=points)


def link_version(tracking: Tracking, version: Version, drafter: Manifest) -> None:
    """Link a registered version and its logged model to each other."""
    with tracking.best_effort():
        client, experiment = tracking.connect()
        if (model := _find(client, experiment, drafter)) is None:
            return
        page = f"[Metrics by prompt set](#/experiments/{experiment}/models/{model.model_id})"
        client.update_model_version(version.line, str(version.number), f"{version.tags['decision']}\n\n{page}")
        client.set_model_version_tag(version.line, str(version.number), "draftsmith.model_id", model.model_id)
        linked = json.loads((model.tags or {}).get("mlflow.modelVersions", "[]"))
        link = {"name": version.line, "version": str(version.number)}
        if link not in linked:
            client.set_logged_model_tags(model.model_id, {"mlflow.modelVersions": json.dumps([*linked, link])})


def _find(client: MlflowClient, experiment: str, drafter: Manifest) -> LoggedModel | None:
    weights = f"params.{_WEIGHTS} = '{drafter.files[_FILE].sha256}'"
    models = client.search_logged_models([experiment], weights, max_results=1)
    return models[0] if models else None


def _create(client: MlflowClient, experiment: str, name: str, drafter: Manifest) -> LoggedModel:
    params = {
        _WEIGHTS: drafter.files[_FILE].sha256,
        "stage": drafter.stage,
        "key": drafter.key,
        "content_id": drafter.content_id,
    }
    model = client.create_logged_model(
        experiment,
        name=re.sub("[/:.%\"']", "_", name),
        source_run_id=drafter.mlflow_run_id,
        tags={"mlflow.model.isExternal": "true"},  # its files are in the store
        params=params,
        model_type="drafter",
    )
    return client.finalize_logged_model(model.model_id, "READY")
