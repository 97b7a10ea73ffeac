"""Our configs, metrics and artifacts in MLflow's terms and within its limits."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from draftsmith.artifacts.manifest import MANIFEST, ArtifactRef
from draftsmith.artifacts.redaction import redacted

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
PARAM_KEY_CHARS, PARAM_VALUE_CHARS, DIGEST_CHARS = 250, 6000, 36

REVIEW_FILES = (
    MANIFEST,
    "summary.json",
    "evaluation.json",
    "decision.json",
    "drafter.json",
    "report.html",
    "*.svg",
    "*.png",
)
REVIEW_BYTES = 20_000_000  # anything larger is no review file


def allowed(name: str) -> str:
    """A name with `_` for every character that MLflow refuses in keys."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:PARAM_KEY_CHARS]


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested config as MLflow params: dotted names, lists as JSON, long values cut to MLflow's limit."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        key = allowed(f"{prefix}{name}")
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{key}.")
        else:
            text = redacted(value if isinstance(value, str) else json.dumps(value, default=str))
            flat[key] = text if len(text) <= PARAM_VALUE_CHARS else text[: PARAM_VALUE_CHARS - 1] + "…"
    return flat


def log_params(client: MlflowClient, run_id: str, config: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(key, value) for key, value in flatten(config).items()]
    for start in range(0, len(params), PARAMS_PER_BATCH):
        client.log_batch(run_id, params=params[start : start + PARAMS_PER_BATCH])


def log_metrics(client: MlflowClient, run_id: str, points: list[tuple[str, float, int]]) -> None:
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    metrics = [Metric(allowed(name), value, now, step) for name, value, step in points]
    for start in range(0, len(metrics), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])


def end_run(
    client: MlflowClient, run_id: str, status: Status, figures: Mapping[str, float], files: Iterable[Path] = ()
) -> None:
    """With its final figures and files. Where the files are refused, as their place is another's or gone, the run has
    ended all the same."""
    log_metrics(client, run_id, [(name, float(value), 0) for name, value in figures.items()])
    refused: Exception | None = None
    try:
        for path in files:
            client.log_artifact(run_id, str(path))
    except Exception as error:
        refused = error
    client.set_terminated(run_id, status)
    if refused is not None:
        raise refused


def review_files(folder: Path) -> list[Path]:
    """Of an artifact, never its weights."""
    found = [path for pattern in REVIEW_FILES for path in sorted(folder.glob(pattern))]
    return [path for path in found if path.stat().st_size <= REVIEW_BYTES]


def log_datasets(client: MlflowClient, run_id: str, inputs: Mapping[str, ArtifactRef]) -> None:
    """Lineage with our own content id as digest: MLflow's own digest looks at a sample of the rows."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    datasets = [
        DatasetInput(
            Dataset(
                name=f"{ref.stage}/{ref.key[:16]}",
                digest=ref.content_id[:DIGEST_CHARS],
                source_type="local",
                source=json.dumps({"uri": ref.uri}),
                profile=json.dumps({"content_id": ref.content_id, "key": ref.key}),
            ),
            [InputTag("mlflow.data.context", name)],
        )
        for name, ref in inputs.items()
    ]
    if datasets:
        client.log_inputs(run_id, datasets)


def upgrade_database(uri: str) -> None:
    """Bring a database of an older MLflow up to date, through MLflow's own command."""
    from mlflow.db import upgrade

    upgrade.callback(uri)


def every(search: Callable[..., Any]) -> Iterator[Any]:
    """What a search of MLflow's client finds, page by page."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        if not (token := page.token):
            return
