"""MLflow runs of refreshes and stages. The store is authoritative, so a failure of MLflow is only a warning."""

from __future__ import annotations

import logging
import os
import platform
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pynvml  # noqa: F401  # MLflow's monitor logs GPUs only if this is imported

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.identifiers import without_credentials
from draftsmith.artifacts.locks import locked
from draftsmith.artifacts.redaction import redacted
from draftsmith.artifacts.store.manifest import Artifact, Manifest
from draftsmith.artifacts.tracking.client import (
    check_database_disk,
    configure,
    copy_database,
    ping,
    sqlite_file,
)
from draftsmith.artifacts.tracking.terms import (
    METRICS_PER_BATCH,
    Status,
    end_run,
    log_datasets,
    log_metrics,
    review_files,
    source_tags,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

EXPERIMENT = "draftsmith"
# Tags of every run: its stage ("refresh" for a whole one), the key of what it makes, host and folder of its home.
STAGE, KEY, HOME = "stage", "key", "home"
CONFIG = "config"  # tag of a refresh: the name of its config
NOTE = "mlflow.note.content"  # tag that MLflow shows as the description of a run or an experiment
# Tag of an experiment, without which MLflow's page asks for its kind.
_KIND = {"mlflow.experimentKind": "custom_model_development"}
SCHEMA_MISMATCH = "out-of-date database schema"  # MLflow's message for a database of another version
LOCKED = "database is locked"  # SQLite's message while another program writes
_HTTP = ("http://", "https://")
_DATABASE_ERROR = re.compile(r"\([\w.]+\.\w+Error\) ")  # (sqlite3.OperationalError) …
CURVES = "train/"  # prefix of the metrics of stages: MLflow sorts by name, so that a refresh's metrics come first
FLUSH_S = 5.0  # metrics reach MLflow at most this late
AFTER_FAILURE_S = 60.0  # pause after a failure; doubles with every further one, up to 8 minutes


class Tracking:
    """The connection to MLflow at `MLFLOW_TRACKING_URI`, by default the database in `folder` (the home)."""

    def __init__(self, folder: Path, experiment: str | None = None) -> None:
        """Choose server and experiment without connecting. `MLFLOW_EXPERIMENT_NAME` overrides `experiment`."""
        self.folder = folder.resolve()
        self.experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment or EXPERIMENT
        self.line = experiment  # the model line with this experiment; None: the common experiment
        self.default_uri = f"sqlite:///{self.folder / 'mlflow.db'}"
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or self.default_uri
        self.is_default = self.uri == self.default_uri  # the home's own database, used by nobody else
        self._connected: tuple[MlflowClient, str] | None = None
        self._warned = False

    @property
    def public_uri(self) -> str:
        """Return the server's or database's URI for messages, tags and pages: without credentials."""
        return without_credentials(self.uri)

    @property
    def ui_command(self) -> str:
        """Return the command, or the address, that shows the runs."""
        return f"mlflow ui --backend-store-uri {self.public_uri}" if _is_db(self.uri) else self.public_uri

    def link(self, run_id: str | None) -> str:
        """Return a Markdown link to a run's page; empty if MLflow is not a server, or does not answer."""
        if run_id is not None and self.uri.startswith(_HTTP):
            with self.best_effort():
                experiment = self.connect()[0].get_run(run_id).info.experiment_id
                server = self.public_uri.rstrip("/")
                return f" ([in MLflow]({server}/#/experiments/{experiment}/runs/{run_id}/artifacts/report.html))"
        return ""

    def check(self) -> None:
        """Raise one clear error within seconds if MLflow cannot be used. Call this before long work."""
        try:
            self.require_writable()
            if self.uri.startswith(_HTTP):
                ping(self.uri)
            self._check_experiment()
        except DraftsmithError:
            raise
        except Exception as error:
            reason = first_line(error)
            retryable = not is_permission_error(error) and (LOCKED in reason or self.uri.startswith(_HTTP))
            raise (RetryableError if retryable else DraftsmithError)(self.unusable_message(error)) from error

    def unusable_message(self, error: Exception) -> str:
        """Return the message for an MLflow that cannot be used: cause, then remedy."""
        reason = first_line(error)
        if is_permission_error(error):
            return (
                f"MLFLOW_TRACKING_URI {self.public_uri} refuses this user ({reason}). Correct user and password (in "
                "the address, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD), or ask for permission."
            )
        if LOCKED in reason:
            return f"MLflow's database {self.public_uri} is locked. Stop the program that uses it."
        if SCHEMA_MISMATCH in reason:
            return (
                f"MLflow's database {self.public_uri} was made by another version of MLflow. Back it up and run "
                f"`mlflow db upgrade {self.public_uri}`, or install that version."
            )
        if self.is_default:
            return (
                f"MLflow's database {self.public_uri}: {reason}. Make it writable, or restore it from a backup. A "
                "new database would lack all lines, champions and runs."
            )
        return (
            f"MLFLOW_TRACKING_URI {self.public_uri}: {reason}. Start the server, correct the variable, or unset it "
            "to use SQLite."
        )

    def stage_run(
        self,
        parent_run_id: str | None,
        stage: str,
        key: str,
        *,
        name: str | None = None,
        inputs: Mapping[str, Artifact] | None = None,
    ) -> StageRun:
        """Start the nested run of a stage, or resume the unfinished one of the same key. Needs the key's lock.

        The run has curves of training; config and final metrics are in its file `manifest.json`.

        name: the run's name, by default the stage's. inputs: its data sets.
        """
        run = StageRun(self)
        with self.best_effort(run):
            client, experiment = self.connect()
            tags = self.tags(stage, key) | ({"mlflow.parentRunId": parent_run_id} if parent_run_id else {})
            old = self._unfinished(key)
            if old is None:
                run.run_id = client.create_run(experiment, run_name=name or stage, tags=tags).info.run_id
            else:
                run.run_id, run.resumed = old.info.run_id, True
                client.update_run(run.run_id, status="RUNNING")
                for tag, value in tags.items():
                    client.set_tag(run.run_id, tag, value)
            log_datasets(client, run.run_id, inputs or {})
        return run

    def finish_interrupted_run(self, manifest: Manifest, folder: Path) -> None:
        """Mark the run of a complete artifact as finished, if it failed because the commit was interrupted."""
        run_id = manifest.mlflow_run_id
        if run_id is not None:
            with self.best_effort():
                client, _ = self.connect()
                if client.get_run(run_id).info.status in ("FAILED", "KILLED"):
                    end_run(client, run_id, "FINISHED", review_files(folder))

    def check_file_system(self) -> None:
        """Raise DraftsmithError if the database is SQLite on a network file system."""
        if (database := sqlite_file(self.uri)) is not None:
            advice = "Start an MLflow server and set MLFLOW_TRACKING_URI to its address"
            check_database_disk(database, "MLflow's database", advice)

    def is_local_run(self, run: Run) -> bool:
        """Return whether a run belongs to this home and machine: locks do not cover processes elsewhere."""
        return bool(run.data.tags.get(HOME) == self._home)

    @property
    def had_failures(self) -> bool:
        """Return whether MLflow failed at any request."""
        return self._warned

    def refresh_file(self, key: str) -> Path:
        """Return the lock file of a refresh, which is locked as long as its process lives."""
        return self.folder / "refreshes" / f".lock-{key[:16]}"

    # -- inside --------------------------------------------------------------------------------------------------

    def connect(self) -> tuple[MlflowClient, str]:
        """Return the client and the experiment's id; one process at a time migrates an old database first.

        In a read-only home it opens a copy of the database, since MLflow writes to any that it opens.
        """
        if self._connected is None:
            self.check_file_system()
            configure()
            if self.read_only:
                self._connected = self._open(f"sqlite:///{copy_database(self.uri)}")
            else:
                with locked(self.folder / ".lock-mlflow", "MLflow's database"):
                    self._connected = self._open(self.uri)
        return self._connected

    @property
    def read_only(self) -> bool:
        """Return whether this user may not write the database file or its folder, which SQLite also writes to."""
        database = sqlite_file(self.uri)
        if database is None or not database.is_file():
            return False
        return not all(os.access(path, os.W_OK) for path in (database, database.parent))

    def require_writable(self) -> None:
        """Raise DraftsmithError if the database is read-only."""
        if self.read_only:
            raise DraftsmithError(
                f"MLflow's database {self.public_uri} is read-only for you. Ask its owner for permission."
            )

    def _open(self, uri: str) -> tuple[MlflowClient, str]:
        for noisy in ("alembic", "mlflow"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        from mlflow import MlflowClient  # here: the import takes seconds, and planning does not need it

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # its import sets the level again
        if os.environ.get("DRAFTSMITH_DEBUG") != "1":  # we report failures in one line, without MLflow's traceback
            for noisy in ("mlflow.store.db", "mlflow.system_metrics"):
                logging.getLogger(noisy).setLevel(logging.CRITICAL)
        client = MlflowClient(uri, registry_uri=uri)
        try:
            return client, self._experiment(client)
        except Exception as error:
            if not self.is_default or "out-of-date database schema" not in str(error):
                raise
            from mlflow.db import upgrade  # here: importing mlflow takes seconds

            upgrade.callback(uri)  # as MLflow's own command does
            return client, self._experiment(client)

    def _experiment(self, client: MlflowClient) -> str:
        name = self.experiment
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            # A server chooses where its files go; with a bare database they go into this home.
            location = (self.folder / "mlartifacts" / name).as_uri() if _is_db(self.uri) else None
            return client.create_experiment(name, artifact_location=location, tags=_KIND)
        return experiment.experiment_id

    def _check_experiment(self) -> None:
        """Raise DraftsmithError if the experiment was deleted, since MLflow still finds it but refuses runs."""
        client, experiment_id = self.connect()
        experiment = client.get_experiment(experiment_id)
        if experiment.lifecycle_stage == "deleted":
            restore = (
                f"MLFLOW_TRACKING_URI={self.public_uri} mlflow experiments restore --experiment-id {experiment_id}"
            )
            raise DraftsmithError(
                f"MLflow's experiment {self.experiment} is deleted and takes no runs. Restore it (`{restore}`), or set "
                "MLFLOW_EXPERIMENT_NAME to another name."
            )

    def tags(self, stage: str, key: str) -> dict[str, str]:
        """Return the tags that every run has."""
        return {STAGE: stage, KEY: key, HOME: self._home, **source_tags()}

    @property
    def _home(self) -> str:
        return f"{platform.node()}:{self.folder}"

    def _unfinished(self, key: str) -> Run | None:
        client, experiment = self.connect()
        query = f"tags.{KEY} = '{key}' and attributes.status != 'FINISHED'"
        runs = filter(self.is_local_run, client.search_runs([experiment], query, max_results=1000))
        return max(runs, key=lambda run: run.info.start_time, default=None)

    @contextmanager
    def best_effort(self, run: StageRun | None = None) -> Iterator[None]:
        """Suppress any failure of MLflow in the body, with one warning; the stage goes on, and `run` retries later."""
        try:
            yield
        except Exception as error:
            if run is not None:
                run.failed()
            if not self._warned:
                log.warning(
                    "MLflow at %s failed (%s). Results are safe in the store, but MLflow may lack some of them.",
                    self.public_uri,
                    first_line(error),
                )
            self._warned = True


class StageRun:
    """The run of one stage. Metrics are sent in batches, and buffered while MLflow fails, so the stage never waits."""

    def __init__(self, tracking: Tracking) -> None:
        self.run_id: str | None = None
        self.resumed = False
        self._tracking = tracking
        self._buffer: list[tuple[str, float, int]] = []
        self._flushed = time.monotonic()
        self._failures = 0
        self._last_step: dict[str, int] = {}  # in a resumed run: metric -> last step that MLflow has

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log the values of one step. They are sent at the first call after `FLUSH_S` seconds, or when the run ends."""
        self._buffer += [(f"{CURVES}{name}", float(value), step) for name, value in values.items()]
        waited = time.monotonic() - self._flushed
        if self._failures:
            due = waited > AFTER_FAILURE_S * 2 ** min(self._failures - 1, 3)
        else:
            due = waited > FLUSH_S or len(self._buffer) >= METRICS_PER_BATCH
        if due:
            self.flush()

    @contextmanager
    def system_metrics(self) -> Iterator[None]:
        """Log the machine's load every ten seconds during the body, with MLflow's own monitor."""
        monitor = None
        if self.run_id is not None:
            with self._tracking.best_effort():
                # here: importing mlflow takes seconds
                from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

                uri = self._tracking.uri
                monitor = SystemMetricsMonitor(self.run_id, resume_logging=self.resumed, tracking_uri=uri)
                monitor.start()
        try:
            yield
        finally:
            if monitor is not None:
                monitor.finish()

    def flush(self) -> None:
        """Send the buffered metrics; keep them if that fails."""
        points, failures = list(self._buffer), self._failures

        def send(client: MlflowClient, run_id: str) -> None:
            log_metrics(client, run_id, [p for p in points if p[2] > self._known_step(client, run_id, p[0])])

        self._call(send)
        self._flushed = time.monotonic()
        if self._failures == failures:  # sent, or there is no run to send it to
            self._buffer, self._failures = [], 0

    def failed(self) -> None:
        """Note a failure: some of the metrics may have arrived, so the last steps are read from MLflow again."""
        self._failures += 1
        self.resumed = True
        self._last_step.clear()

    def close(self, status: Status, folder: Path | None = None) -> None:
        """End the run with the review files of the artifact in `folder`, never its weights."""
        self.flush()

        if not self._failures:  # otherwise `close_dead_runs` ends it later

            def end(client: MlflowClient, run_id: str) -> None:
                end_run(client, run_id, status, review_files(folder) if folder is not None else ())

            self._call(end)

    def _call(self, act: Callable[[MlflowClient, str], None]) -> None:
        if self.run_id is not None:
            with self._tracking.best_effort(self):
                act(self._tracking.connect()[0], self.run_id)

    def _known_step(self, client: MlflowClient, run_id: str, name: str) -> int:
        if not self.resumed:
            return -1
        if name not in self._last_step:
            history = client.get_metric_history(run_id, name)
            self._last_step[name] = max((metric.step for metric in history), default=-1)
        return self._last_step[name]


def _is_db(uri: str) -> bool:
    return uri.startswith(("sqlite:", "postgresql", "mysql", "mssql"))


def is_permission_error(error: Exception) -> bool:
    """Return whether a server refuses this user, so that a retry does not help."""
    return getattr(error, "error_code", None) in ("PERMISSION_DENIED", "UNAUTHENTICATED")


def first_line(error: BaseException) -> str:
    """Return the first line of an error; for SQLAlchemy's errors, the database's own message."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return redacted(next(filter(_DATABASE_ERROR.match, lines), lines[0]))[:300]
