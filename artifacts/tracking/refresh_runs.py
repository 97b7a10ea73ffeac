"""Refreshes in MLflow: their runs, which are opened with the first stage or found again, and the drafters they compare.

A drafter is a logged model of MLflow, with metrics by data set and links from registered versions. The checksum of its
weights identifies it: this week's champion is the `opd` of an earlier refresh, and gets the metrics of every comparison
that it was in.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
import time
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.identifiers import IdentifierError, absolute_path, file_path, plain_name, relative_path
from draftsmith.artifacts.locks import is_locked, locked
from draftsmith.artifacts.store.local import SHORT, Store
from draftsmith.artifacts.store.manifest import Artifact, Manifest
from draftsmith.artifacts.tracking.registry import Version
from draftsmith.artifacts.tracking.runs import CONFIG, HOME, KEY, NOTE, STAGE, Tracking
from draftsmith.artifacts.tracking.terms import (
    Status,
    end_run,
    log_datasets,
    log_metrics,
    log_params,
    review_files,
    sanitize_key,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

_MADE = "made."  # prefix of a refresh's params: the artifact of each node
OUTCOME = "outcome"  # tag: the outcome of a refresh
VERSION = "version"  # tag: the version that it made, such as `my-line@3`
REUSED = "reused"  # tag: how often a finished refresh was run again without new artifacts, and when last
CONTINUE = "To continue:"  # before the command, in the description of a refresh that did not finish
# Tag of an experiment: the table of its runs that MLflow shows at `…/runs?viewStateShareKey=headlines`.
_VIEW = "mlflow.sharedViewState.headlines"
_IS_REFRESH = f"tags.{STAGE} = 'refresh'"


def artifact_params(artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    """Return the params that record each node's artifact: folder in the store and content id."""
    return {
        sanitize_key(f"{_MADE}{name}"): f"{ref.stage}/{ref.key[:SHORT]}#{ref.content_id[:16]}"
        for name, ref in artifacts.items()
    }


def artifact_folders(tracking: Tracking, name: str, node: str) -> dict[str, str]:
    """Return node -> folder of the artifacts of a refresh; empty if there is no such refresh.

    name: the run's id, or the name of a run or a config. A name stands for the last such refresh that made `node`.
    """
    if (run := _find_refresh(tracking, name, node)) is None:
        return {}
    made = {n.removeprefix(_MADE): v for n, v in run.data.params.items() if n.startswith(_MADE)}
    where = f"run {run.info.run_name} in MLflow"
    store = absolute_path(run.data.tags.get(HOME, "").partition(":")[2], where=f"{where}: tag {HOME}") / "store"
    folders = {n: relative_path(v.rsplit("#", 1)[0], where=f"{where}: param {_MADE}{n}") for n, v in made.items()}
    return {n: str(store / folder) for n, folder in folders.items()}


def fetch_page(tracking: Tracking, name: str, node: str, page: str, folder: Path) -> None:
    """Copy the page of a refresh's report from MLflow into the folder. name, node: see `artifact_folders`."""
    if (run := _find_refresh(tracking, name, node)) is not None:
        client, _ = tracking.connect()
        if any(file.path == page for file in client.list_artifacts(run.info.run_id)):
            folder.mkdir(parents=True, exist_ok=True)
            client.download_artifacts(run.info.run_id, page, str(folder))


def _find_refresh(tracking: Tracking, name: str, node: str) -> Run | None:
    client, _ = tracking.connect()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    conditions = [_is(field, name) for field in (f"tags.{CONFIG}", "attributes.run_name")]
    if re.fullmatch("[0-9a-f]{32}", name):
        conditions = [_is("attributes.run_id", name)]
    for condition in conditions:
        for run in client.search_runs(experiments, f"{condition} and {_IS_REFRESH}", max_results=100):
            if f"{_MADE}{node}" in run.data.params:
                return run
    return None


def _is(field: str, name: str) -> str:
    quote = '"' if "'" in name else "'"  # MLflow's filters have no other escape
    return f"{field} = {quote}{name}{quote}"


@dataclass(frozen=True)
class LastRefresh:
    """How the last refresh in an experiment ended, or that it runs."""

    at: str  # ISO 8601, UTC
    outcome: str  # the tag's, or failed, killed or running
    text: str  # why; if it did not finish, with the command that continues it


def last_refresh(tracking: Tracking) -> LastRefresh | None:
    """Return the refresh that ended or began last. Those that finished without an outcome do not count.

    Nothing is written: an experiment that does not exist is not created.
    """
    client, _ = Tracking(tracking.folder).connect()
    if (experiment := client.get_experiment_by_name(tracking.experiment)) is None:
        return None
    newest = ["attributes.start_time DESC"]
    runs = client.search_runs([experiment.experiment_id], _IS_REFRESH, max_results=100, order_by=newest)
    ended = [_ending(run, tracking) for run in runs if OUTCOME in run.data.tags or run.info.status != "FINISHED"]
    return max(ended, key=lambda refresh: refresh.at, default=None)


def _ending(run: Run, tracking: Tracking) -> LastRefresh:
    tags, status = run.data.tags, run.info.status
    at = datetime.fromtimestamp((run.info.end_time or run.info.start_time) / 1000, UTC).isoformat(timespec="seconds")
    text = re.sub(r"^\*\*.*?\*\* *", "", tags.get(NOTE, "").partition("\n")[0])  # without its label
    if status == "FINISHED":
        again = tags.get(REUSED, "").partition(", last at ")[2]
        return LastRefresh(again or at, tags[OUTCOME], text.replace("\\", "").replace("&lt;", "<"))
    if status == "RUNNING" and tracking.is_local_run(run) and not is_locked(tracking.refresh_file(tags[KEY])):
        status = "KILLED"  # the next run will close it
    if status == "KILLED" and CONTINUE not in text:  # it could not note how to continue
        text = f"its process was gone. {CONTINUE} `{tags.get('mlflow.source.name', 'the same command')}`."
    return LastRefresh(at, status.lower(), text)


def close_dead_runs(tracking: Tracking, store: Store) -> list[str]:
    """End the runs of this home whose process is gone, and return their names.

    The status is FINISHED if the artifact is complete (MLflow failed, or the process died after the commit), else
    KILLED. Runs of another host or path (a replaced container, a moved home) are closed if their lock file is here,
    and so are the runs of their stages.
    """
    closed: list[str] = []
    with tracking.best_effort():
        client, _ = tracking.connect()
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        gone: set[str] = set()  # ids of closed refreshes
        running = client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=1000)
        ours = [run for run in running if _is_ours(run)]
        for run in sorted(ours, key=lambda run: run.data.tags[STAGE] != "refresh"):
            tags, stage, key = run.data.tags, run.data.tags[STAGE], run.data.tags[KEY]
            lock = tracking.refresh_file(key) if stage == "refresh" else None
            here = lock.exists() if lock is not None else tags.get("mlflow.parentRunId") in gone
            if not here and not tracking.is_local_run(run):
                continue
            held = is_locked(lock) if lock is not None else store.is_claimed(stage, key)
            if held or client.get_run(run.info.run_id).info.status != "RUNNING":  # ended since the search
                continue
            client.set_tag(run.info.run_id, NOTE, "Closed by a later run: its process was gone.")
            ref = None if stage == "refresh" else _made_by(run.info.run_id, store, stage, key)
            if ref is None:
                client.set_terminated(run.info.run_id, "KILLED")
            else:
                end_run(client, run.info.run_id, "FINISHED", review_files(ref.path))
            closed.append(run.info.run_name)
            gone.add(run.info.run_id)
    return closed


def _is_ours(run: Run) -> bool:
    """Return whether a run has our tags, with values that can be parts of paths."""
    tags = run.data.tags
    try:
        plain_name(tags.get(STAGE))
        plain_name(tags.get(KEY))
    except IdentifierError:
        return False
    return HOME in tags


def _made_by(run_id: str, store: Store, stage: str, key: str) -> Artifact | None:
    """Return the complete artifact of a key if this run made it: a killed forced run leaves an older one there."""
    try:
        ref = store.find(stage, key)
        return ref if ref is not None and ref.manifest.mlflow_run_id == run_id else None
    except DraftsmithError:
        return None


def describe_misplaced_files(tracking: Tracking) -> str | None:
    """Return the error for a moved or copied home whose runs would write files outside it; None if there is none."""
    if not tracking.is_default:
        return None
    with tracking.best_effort():
        client, experiment = tracking.connect()
        location = str(client.get_experiment(experiment).artifact_location)
        if location.startswith("file:") and not file_path(location).is_relative_to(tracking.folder):
            return (
                f"MLflow writes the files of experiment {tracking.experiment} to {location}, outside the home "
                f"{tracking.folder}, which was moved or copied. Move it back, or use another experiment "
                "(MLFLOW_EXPERIMENT_NAME)."
            )
    return None


class RefreshRun:
    """The MLflow run of one flow run, alive as long as this process. Stages that run concurrently open it once."""

    def __init__(self, tracking: Tracking, name: str, params: Mapping[str, Any], data: Collection[str] = ()) -> None:
        """Begin no run yet. params: the config. data: nodes whose artifacts are the run's data sets."""
        self._tracking, self._name, self._params, self._data = tracking, name, params, data
        self._id: str | None = None
        self._building = False  # a stage was made, so no earlier run has the same artifacts
        self._earlier: str | None = None  # the finished run that has the same artifacts
        self._opening, self._alive, self._files = threading.Lock(), ExitStack(), list[Path]()

    def open(self) -> str | None:
        """Return the run's id for a stage that is to be made; None if MLflow failed: the next call tries again."""
        self._building = True
        return self._open()

    def find_or_open(self, artifacts: Mapping[str, Artifact]) -> str | None:
        """Return the id of this run, or of an earlier one that has exactly the same artifacts.

        Returns None if MLflow failed: the next call tries again.
        """
        if not self._building and self._id is None and self._earlier is None:
            made = artifact_params(artifacts).items()
            finished = f"{_is(f'tags.{CONFIG}', self._name)} and {_IS_REFRESH} and attributes.status = 'FINISHED'"
            with self._tracking.best_effort():
                client, experiment = self._tracking.connect()
                runs = client.search_runs([experiment], finished, max_results=100)
                self._earlier = next((run.info.run_id for run in runs if made <= run.data.params.items()), None)
        return self._earlier or self._open()

    def _open(self) -> str | None:
        with self._opening:
            if self._id is not None:
                return self._id
            key = secrets.token_hex(8)
            with self._tracking.best_effort():
                client, experiment = self._tracking.connect()
                file = self._tracking.refresh_file(key)
                self._alive.enter_context(locked(file))
                self._files.append(file)
                tags = {**self._tracking.tags("refresh", key), CONFIG: self._name}
                self._id = client.create_run(experiment, run_name=self._name, tags=tags).info.run_id
                log_params(client, self._id, self._params)
            return self._id

    def close(
        self,
        status: Status,
        artifacts: Mapping[str, Artifact] = {},
        metrics: Mapping[str, float] = {},
        files: Iterable[Path] = (),
        tags: Mapping[str, str] = {},
        *,
        name: str | None = None,
        concluded: bool = False,
    ) -> None:
        """End the run under a new name. A refresh that failed before its first stage was made has none in MLflow.

        files: the report. tags: its outcome. An earlier run with the same artifacts is only tagged as reused, unless it
        ended without a conclusion (`--until`) and this one is `concluded`.
        """
        if self._earlier is not None:
            with self._tracking.best_effort():
                self._tag_earlier(self._earlier, artifacts, metrics, tags, name, concluded=concluded)
            return
        run_id, self._id = self._id, None
        with self._alive.pop_all(), self._tracking.best_effort():
            if run_id is not None:
                client, _ = self._tracking.connect()
                for tag, value in tags.items():
                    client.set_tag(run_id, tag, value)
                log_params(client, run_id, artifact_params(artifacts))
                log_datasets(client, run_id, {node: artifacts[node] for node in self._data if node in artifacts})
                log_metrics(client, run_id, [(metric, float(value), 0) for metric, value in metrics.items()])
                if name is not None:
                    client.update_run(run_id, name=name)
                end_run(client, run_id, status, files)
                _describe_experiment(self._tracking, metrics.keys())
            for file in self._files:  # a later run, even on another host, closes runs that left their file
                file.unlink(missing_ok=True)
            self._files.clear()

    def _tag_earlier(
        self,
        run_id: str,
        artifacts: Mapping[str, Artifact],
        metrics: Mapping[str, float],
        tags: Mapping[str, str],
        name: str | None,
        *,
        concluded: bool,
    ) -> None:
        client, _ = self._tracking.connect()
        run = client.get_run(run_id).data
        recorded = {param: value for param, value in run.params.items() if param.startswith(_MADE)}
        if concluded and OUTCOME not in run.tags and recorded == artifact_params(artifacts):
            client.update_run(run_id, name=name)
            log_metrics(client, run_id, [(metric, value, 0) for metric, value in metrics.items()])
            for tag, text in tags.items():
                client.set_tag(run_id, tag, text)
        times = int(run.tags.get(REUSED, "0").partition(" ")[0]) + 1
        now = datetime.now(UTC).isoformat(timespec="seconds")
        client.set_tag(run_id, REUSED, f"{times} time{'s' * (times > 1)}, last at {now}")


def _describe_experiment(tracking: Tracking, metrics: Collection[str]) -> None:
    """Give a line's experiment a description, unless it has one, and a view whose columns are its metrics."""
    client, experiment = tracking.connect()
    if tracking.line is None or not metrics:
        return
    tags = client.get_experiment(experiment).tags
    known = json.loads(tags.get(_VIEW, "{}")).get("selectedColumns", [])
    columns = sorted({*known, *(f"metrics.`{name}`" for name in metrics)})
    client.set_experiment_tag(experiment, _VIEW, json.dumps({"selectedColumns": columns}))
    if NOTE not in tags:
        text = (
            f"Refreshes of the model line {tracking.line}. [Its page](#/models/{tracking.line}): the champion and all "
            f"versions. [Its refreshes, with the headline metrics](#/experiments/{experiment}/runs?"
            f"viewStateShareKey={_VIEW.rpartition('.')[2]}). In a terminal: `draftsmith status {tracking.line}`."
        )
        client.set_experiment_tag(experiment, NOTE, text)


ALL = ""  # stands for all data sets together
_WEIGHTS, _FILE = "weights", "drafter/model.safetensors"
_DIGEST_CHARS = 36
Metrics = Mapping[str, Mapping[str, float]]  # data set -> name -> value


def log_models(
    tracking: Tracking, evaluation: Manifest, run_id: str | None, drafters: Mapping[str, tuple[Manifest, Metrics]]
) -> None:
    """Log each compared drafter as a model, unless it has this evaluation's metrics already.

    run_id: the refresh's run, if the evaluation has none. drafters: name of a new model -> manifest of the drafter,
    and its metrics.
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
        page = f"[Metrics by slice](#/experiments/{experiment}/models/{model.model_id})"
        client.update_model_version(version.line, str(version.number), f"{version.tags['decision']}\n\n{page}")
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
