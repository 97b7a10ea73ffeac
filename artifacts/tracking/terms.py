"""Conversion of configs, metrics and files to MLflow, within its limits."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from draftsmith.artifacts.locks import user_name
from draftsmith.artifacts.redaction import redacted
from draftsmith.artifacts.store.manifest import MANIFEST

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

METRICS_PER_BATCH = 1000
PARAMS_PER_BATCH = 100
PARAM_KEY_CHARS, PARAM_VALUE_CHARS, SOURCE_CHARS = 250, 6000, 1000

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
REVIEW_BYTES = 20_000_000  # larger files are not uploaded


def sanitize_key(name: str) -> str:
    """Return a name with `_` for every character that MLflow refuses in keys, cut to its limit."""
    return re.sub(r"[^\w\-. :/]", "_", name)[:PARAM_KEY_CHARS]


def source_tags() -> dict[str, str]:
    """Return MLflow's own tags for user, command and commit.

    The commit is that of this package's checkout, or else of the repository in the working directory, if any.
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
    """Return the text with its Markdown and HTML escaped: names of prompt sets are arbitrary."""
    return text.replace("<", "&lt;").replace("[", "\\[").replace("`", "\\`")


def flatten(config: Mapping[str, object], prefix: str = "") -> dict[str, str]:
    """Return a nested config as MLflow params: dotted names, lists as JSON, long values cut to MLflow's limit."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        key = sanitize_key(f"{prefix}{name}")
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{key}.")
        else:
            text = redacted(value if isinstance(value, str) else json.dumps(value, default=str))
            flat[key] = text if len(text) <= PARAM_VALUE_CHARS else text[: PARAM_VALUE_CHARS - 1] + "…"
    return flat


def log_params(client: MlflowClient, run_id: str, config: Mapping[str, object]) -> None:
    """Log a nested config as params, in batches."""
    from mlflow.entities import Param  # here: importing mlflow takes seconds

    params = [Param(key, value) for key, value in flatten(config).items()]
    for start in range(0, len(params), PARAMS_PER_BATCH):
        client.log_batch(run_id, params=params[start : start + PARAMS_PER_BATCH])


def log_metrics(client: MlflowClient, run_id: str, points: list[tuple[str, float, int]]) -> None:
    """Log (name, value, step) points, in batches."""
    from mlflow.entities import Metric  # here: importing mlflow takes seconds

    now = int(time.time() * 1000)
    metrics = [Metric(sanitize_key(name), value, now, step) for name, value, step in points]
    for start in range(0, len(metrics), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])


def end_run(
    client: MlflowClient, run_id: str, status: Status, metrics: Mapping[str, float], files: Iterable[Path] = ()
) -> None:
    """End a run with its final metrics and files. If a file cannot be logged, end it first, then raise the error."""
    log_metrics(client, run_id, [(name, float(value), 0) for name, value in metrics.items()])
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


def upgrade_database(uri: str) -> None:
    """Migrate a database of an older MLflow, through MLflow's own command."""
    from mlflow.db import upgrade  # here: importing mlflow takes seconds

    upgrade.callback(uri)


def paginate(search: Callable[..., Any]) -> Iterator[Any]:
    """Yield the results of a search of MLflow's client, page by page."""
    token = None
    while True:
        page = search(page_token=token)
        yield from page
        if not (token := page.token):
            return
