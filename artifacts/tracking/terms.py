"""Conversion of configs, metrics, files and artifacts to MLflow, within its limits."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow.parquet as pq

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.locks import user_name
from draftsmith.artifacts.redaction import redacted
from draftsmith.artifacts.results.data import LogsSummary, PromptsSummary, day
from draftsmith.artifacts.store.manifest import MANIFEST, Artifact, read_manifest

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset

Status = Literal["FINISHED", "FAILED", "KILLED"]

METRICS_PER_BATCH = 1000
MOST_PARAMS = 44  # of a config; with one for each node of a refresh they are at most 60
PARAM_KEY_CHARS, PARAM_VALUE_CHARS, SOURCE_CHARS = 250, 6000, 1000

REVIEW_FILES = (
    MANIFEST,
    "summary.json",
    "evaluation.json",
    "decision.json",
    "drift.json",
    "drafter.json",
    "report.html",
    "review.json",
)
REVIEW_BYTES = 20_000_000  # larger files are not uploaded


def sanitize_key(name: str) -> str:
    """Return a name with `_` for every character that MLflow refuses in keys, cut to its limit."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:PARAM_KEY_CHARS]


def source_tags() -> dict[str, str]:
    """Return MLflow's own tags for user, command and commit.

    The commit is from this package's checkout, else from the repository in the working directory, if any.
    """
    from mlflow.utils.git_utils import get_git_commit  # here: importing mlflow takes seconds

    program, *arguments = sys.argv
    name = "draftsmith" if Path(program).name == "__main__.py" else Path(program).name
    tags = {
        "mlflow.user": user_name(),
        "mlflow.source.type": "LOCAL",
        "mlflow.source.name": redacted(shlex.join([name, *arguments]))[:SOURCE_CHARS],
    }
    if shutil.which("git") and (commit := get_git_commit(__file__) or get_git_commit(".")):
        tags["mlflow.source.git.commit"] = commit
    return tags


def escape_markdown(text: str) -> str:
    """Return the text with its Markdown and HTML escaped: names of slices are arbitrary."""
    return text.replace("<", "&lt;").replace("[", "\\[").replace("`", "\\`")


def flatten(config: Mapping[str, object]) -> dict[str, str]:
    """Return a config as MLflow params: SECTION.FIELD, or whole sections if it has more than `MOST_PARAMS` fields.

    Deeper values are JSON, and long ones are cut to MLflow's limit.
    """
    fields: dict[str, object] = {}
    for section, value in config.items():
        inner = {f"{section}.{name}": field for name, field in value.items()} if isinstance(value, Mapping) else None
        fields |= {section: value} if inner is None else inner
    flat: dict[str, str] = {}
    for name, value in (fields if len(fields) <= MOST_PARAMS else config).items():
        text = redacted(value if isinstance(value, str) else json.dumps(value, default=str))
        text = text if len(text) <= PARAM_VALUE_CHARS else text[: PARAM_VALUE_CHARS - 1] + "…"
        flat[sanitize_key(name)] = text
    return flat


def log_params(client: MlflowClient, run_id: str, config: Mapping[str, object]) -> None:
    """Log a config as params."""
    from mlflow.entities import Param  # here: importing mlflow takes seconds

    client.log_batch(run_id, params=[Param(key, value) for key, value in flatten(config).items()])


def log_metrics(client: MlflowClient, run_id: str, points: list[tuple[str, float, int]]) -> None:
    """Log (name, value, step) points, in batches."""
    from mlflow.entities import Metric  # here: importing mlflow takes seconds

    now = int(time.time() * 1000)
    metrics = [Metric(sanitize_key(name), value, now, step) for name, value, step in points]
    for start in range(0, len(metrics), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])


def end_run(client: MlflowClient, run_id: str, status: Status, files: Iterable[Path] = ()) -> None:
    """End a run with its files. If a file cannot be logged, end it first, then raise the error."""
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
    """Return the files of an artifact that reviewers need, never its weights."""
    paths = [path for pattern in REVIEW_FILES for path in sorted(folder.glob(pattern))]
    return [path for path in paths if path.stat().st_size <= REVIEW_BYTES]


def paginate(search: Callable[..., Any]) -> Iterator[Any]:
    """Yield the results of a search of MLflow's client, page by page."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        if not (token := page.token):
            return


_DIGEST_CHARS, _NAME_CHARS = 36, 200
_SPLITS = ("train", "validation", "heldout")


def log_datasets(client: MlflowClient, run_id: str, inputs: Mapping[str, Artifact]) -> None:
    """Log artifacts as data sets of a run. inputs: node -> artifact."""
    from mlflow.entities import DatasetInput, InputTag  # here: importing mlflow takes seconds

    datasets = [
        DatasetInput(_dataset(node, ref), [InputTag("mlflow.data.context", node)]) for node, ref in inputs.items()
    ]
    if datasets:
        client.log_inputs(run_id, datasets)


def _dataset(node: str, ref: Artifact) -> Dataset:
    from mlflow.entities import Dataset  # here: importing mlflow takes seconds

    name = node
    try:
        rows, columns = _table(ref.path)
        manifest = read_manifest(ref.path)
        metrics = manifest.metrics
        if rows is not None:
            name = _name(node, ref.path, rows, manifest.created_at)
    except (DraftsmithError, OSError, ValueError):  # only in the bucket, or damaged: the data set has only its digest
        rows, columns, metrics = None, [], {}
    profile = {"num_rows": rows} if rows is not None else {}
    return Dataset(
        name=name[:_NAME_CHARS],
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


def _name(node: str, folder: Path, rows: int, created_at: str) -> str:
    """Return a data set's name: its node, how many rows of which kind it has, and its time.

    `heldout: 36 answers, 1 Dec`, `logs: 228 answers, week of 24 Nov`, or `prompts: 192 train, 4 validation, 36 heldout
    (gsm_symbolic + 2), 1 Dec`.
    """
    logs, prompts = LogsSummary.read_if_there(folder), PromptsSummary.read_if_there(folder)
    when = (logs.window.text if logs is not None else "") or day(datetime.fromisoformat(created_at))
    amount = f"{rows} {'answers' if (folder / 'trajectories.parquet').is_file() else 'rows'}"
    if prompts is not None and prompts.counts:
        counts, splits = prompts.counts, Counter[str]()
        for by_split in counts.values():
            splits.update(by_split)
        first = max(counts, key=lambda source: sum(counts[source].values()))
        others = f" + {len(counts) - 1}" if len(counts) > 1 else ""
        amount = f"{', '.join(f'{splits[name]} {name}' for name in _SPLITS if splits[name])} ({first}{others})"
    return f"{node}: {amount}, {when}"
