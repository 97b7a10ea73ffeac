"""Logging of artifacts as data sets of an MLflow run: a readable name, rows, columns and the content id."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.data import PromptsSummary
from draftsmith.artifacts.store.manifest import ArtifactRef, read_manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset

_DIGEST_CHARS, _NAME_CHARS = 36, 200
_SPLITS = ("train", "validation", "heldout")


def log_datasets(client: MlflowClient, run_id: str, inputs: Mapping[str, ArtifactRef]) -> None:
    """Log artifacts as data sets of a run. inputs: node -> artifact."""
    from mlflow.entities import DatasetInput, InputTag  # here: importing mlflow takes seconds

    datasets = [
        DatasetInput(_dataset(node, ref), [InputTag("mlflow.data.context", node)]) for node, ref in inputs.items()
    ]
    if datasets:
        client.log_inputs(run_id, datasets)


def _dataset(node: str, ref: ArtifactRef) -> Dataset:
    from mlflow.entities import Dataset  # here: importing mlflow takes seconds

    try:
        rows, columns = _table(ref.path)
        metrics = read_manifest(ref.path).metrics
    except (DraftsmithError, OSError, ValueError):  # only in the bucket, or damaged: the data set has only its digest
        rows, columns, metrics = None, [], {}
    profile = {"num_rows": rows} if rows is not None else {}
    return Dataset(
        name=_name(node, ref.path, rows)[:_NAME_CHARS],
        digest=ref.content_id[:_DIGEST_CHARS],  # MLflow's own digest covers only a sample of the rows
        source_type="local",
        source=json.dumps({"uri": ref.uri}),
        schema=json.dumps({"mlflow_colspec": columns}) if columns else None,
        profile=json.dumps({**profile, **metrics, "content_id": ref.content_id, "key": ref.key}),
    )


def _table(folder: Path) -> tuple[int | None, list[dict[str, object]]]:
    """Return the number of rows and the columns of the artifact's largest table; (None, []) if there is none here."""
    tables = sorted(folder.glob("*.parquet"), key=lambda path: path.stat().st_size)
    if not tables:
        return None, []
    footer = pq.ParquetFile(tables[-1])
    columns = [
        {"name": field.name, "type": str(field.type), "required": not field.nullable} for field in footer.schema_arrow
    ]
    return int(footer.metadata.num_rows), columns


def _name(node: str, folder: Path, rows: int | None) -> str:
    """Return a name such as `gsm_symbolic + 2, 192/4/36` (train, validation, held-out), or `heldout, 36 rows`."""
    try:
        counts = PromptsSummary.read(folder).counts
        first = max(counts, key=lambda source: sum(counts[source].values()))
    except (DraftsmithError, OSError, ValueError):
        return node if rows is None else f"{node}, {rows} rows"
    splits: Counter[str] = Counter()
    for by_split in counts.values():
        splits.update(by_split)
    others = f" + {len(counts) - 1}" if len(counts) > 1 else ""
    return f"{first}{others}, {'/'.join(str(splits[name]) for name in _SPLITS)}"
