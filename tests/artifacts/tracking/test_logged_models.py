"""Drafters as logged models in a real MLflow on SQLite: ranked by tau on one prompt set, linked to versions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact, Manifest
from draftsmith.artifacts.tracking.refresh_runs import ALL, link_version, log_models
from draftsmith.artifacts.tracking.registry import Registry
from draftsmith.artifacts.tracking.runs import Tracking
from tests.testbed.artifacts import committed


def made(store: Store, stage: str, name: str, files: dict[str, str], **inputs: Artifact) -> Artifact:
    key = store.key(stage, "c", {"name": name}, {}, 0)
    run = Tracking(store.root.parent, "my-line").stage_run(None, stage, key)
    run.close("FINISHED")
    return committed(store, stage, files, key, inputs=inputs, mlflow_run_id=run.run_id)


def drafter(store: Store, name: str, weights: str) -> Manifest:
    return made(store, "opd", name, {"drafter/model.safetensors": weights}).manifest


def evaluation(store: Store, week: str) -> Manifest:
    answers = made(store, "rollout", week, {"answers": week})
    return made(store, "evaluation", week, {"evaluation.json": week}, trajectories=answers).manifest


def tau(chat: float, code: float, overall: float) -> dict[str, dict[str, float]]:
    return {ALL: {"tau": overall}, "chat": {"tau": chat}, "code": {"tau": code}}


def ranked(tracking: Tracking, **data_set: str) -> list[str]:
    client, experiment = tracking.connect()
    order: list[dict[str, Any]] = [{"field_name": "metrics.tau", "ascending": False, **data_set}]
    return [model.name for model in client.search_logged_models([experiment], order_by=order)]


@pytest.fixture
def tracking(tmp_path: Path) -> Tracking:
    return Tracking(tmp_path / "home", "my-line")


def test_drafters_of_a_line_are_ranked_on_one_prompt_set(tracking: Tracking) -> None:
    store = Store(tracking.folder / "store")
    sft, opd = drafter(store, "sft", "a"), drafter(store, "opd", "b")
    first = evaluation(store, "first")
    compared = {"sft": (sft, tau(2.0, 3.0, 2.4)), "opd": (opd, tau(2.5, 2.0, 2.3))}
    for _ in range(2):  # the second time as for a reused evaluation
        log_models(tracking, first, None, compared)
    assert ranked(tracking, dataset_name="chat") == ["opd", "sft"]
    assert ranked(tracking, dataset_name="code") == ranked(tracking) == ["sft", "opd"]

    champion = drafter(store, "champion", "b")  # a copy of the promoted drafter
    new = drafter(store, "new", "c")
    later = {"champion": (champion, tau(1.0, 1.0, 1.0)), "new/one": (new, tau(1.5, 1.5, 1.5))}
    log_models(tracking, evaluation(store, "second"), None, later)
    assert ranked(tracking, dataset_name="chat") == ["sft", "new_one", "opd"], "by the last evaluation"
    digest = first.inputs["trajectories"].content_id[:36]
    assert ranked(tracking, dataset_name="chat", dataset_digest=digest)[:2] == ["opd", "sft"]
    client, experiment = tracking.connect()
    (model,) = client.search_logged_models([experiment], "name = 'opd'")
    assert (model.status, model.source_run_id, len(model.metrics)) == ("READY", opd.mlflow_run_id, 6)
    assert {metric.run_id for metric in model.metrics} > {first.mlflow_run_id}


def test_a_version_and_its_logged_model_are_linked(tracking: Tracking) -> None:
    store, registry = Store(tracking.folder / "store"), Registry(tracking)
    ref = made(store, "opd", "opd", {"drafter/model.safetensors": "a"})
    opd = ref.manifest
    version = registry.register("my-line", ref, {"decision": "it is better"})
    link_version(tracking, version, opd)
    log_models(tracking, evaluation(store, "first"), None, {"opd": (opd, tau(2.0, 2.0, 2.0))})
    for _ in range(2):
        link_version(tracking, version, opd)
    client, experiment = tracking.connect()
    (model,) = client.search_logged_models([experiment])
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": "my-line", "version": "1"}]
    description = client.get_model_version("my-line", "1").description
    assert (
        description.startswith("it is better") and f"#/experiments/{experiment}/models/{model.model_id}" in description
    )


def test_losing_mlflow_stops_nothing(tracking: Tracking, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tracking.folder / "store")
    opd, measured = drafter(store, "opd", "a"), evaluation(store, "first")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    lost = Tracking(tracking.folder, "my-line")
    log_models(lost, measured, None, {"opd": (opd, tau(2.0, 2.0, 2.0))})
    assert lost.had_failures
