"""MLflow's view of refreshes and stages. The store is the truth: a tracking failure is a warning, never a loss."""

from __future__ import annotations

import logging
import os
import platform
import re
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.locks import locked
from draftsmith.artifacts.redaction import redacted
from draftsmith.artifacts.store.manifest import ArtifactRef, Manifest
from draftsmith.artifacts.tracking.client import (
    check_database_disk,
    configure,
    copy_database,
    ping,
    sqlite_file,
)
from draftsmith.artifacts.tracking.datasets import log_datasets
from draftsmith.artifacts.tracking.terms import (
    METRICS_PER_BATCH,
    Status,
    end_run,
    log_metrics,
    log_params,
    review_files,
    source_tags,
    upgrade_database,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

log = logging.getLogger(__name__)

EXPERIMENT = "draftsmith"
# tags of every run: its stage ("refresh" for a whole one), what it makes, and the host and folder of its home
STAGE, KEY, HOME = "stage", "key", "home"
NOTE = "mlflow.note.content"  # the tag that MLflow shows as a run's description
_KIND = ("mlflow.experimentKind", "custom_model_development")  # else MLflow asks what the experiment is for
SCHEMA_MISMATCH = "out-of-date database schema"  # of a database: what MLflow says where another version made it
LOCKED = "database is locked"  # what SQLite says of one that another program is writing to
_HTTP = ("http://", "https://")
_DATABASE_ERROR = re.compile(r"\([\w.]+\.\w+Error\) ")  # (sqlite3.OperationalError) …
FLUSH_S = 5.0  # metrics reach MLflow at most this late
AFTER_FAILURE_S = 60.0  # until they are sent again; doubles with every further failure, up to 8 minutes


class Tracking:
    """One process's connection to MLflow: the default database under `folder` (the home), or `MLFLOW_TRACKING_URI`."""

    def __init__(self, folder: Path | None = None, experiment: str | None = None) -> None:
        """experiment: what the runs are filed under, unless `MLFLOW_EXPERIMENT_NAME` says it."""
        self.folder = (folder or home()).resolve()
        self.experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME") or experiment or EXPERIMENT
        self.default_uri = f"sqlite:///{self.folder / 'mlflow.db'}"
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or self.default_uri
        self.is_default = self.uri == self.default_uri  # of this home alone: nobody else's, and no server's
        self._connected: tuple[MlflowClient, str] | None = None
        self._warned = False
        self._refresh: str | None = None
        self._refresh_lock, self._refresh_files = ExitStack(), list[Path]()

    @property
    def ui_command(self) -> str:
        """What a user runs to look at the runs."""
        uri = redacted(self.uri)
        return f"mlflow ui --backend-store-uri {uri}" if _is_db(self.uri) else uri

    def link(self, run_id: str | None) -> str:
        """Return a link to a run's page, in Markdown; empty where MLflow is no server, or does not answer."""
        if run_id is not None and self.uri.startswith(_HTTP):
            with self.best_effort():
                experiment = self.connect()[0].get_run(run_id).info.experiment_id
                server = re.sub("//[^/@]*@", "//", self.uri.rstrip("/"))
                return f" ([in MLflow]({server}/#/experiments/{experiment}/runs/{run_id}/artifacts/report.html))"
        return ""

    def check(self) -> None:
        """One clear error, within seconds, if MLflow cannot be used. Call it before long work."""
        try:
            self.require_writable()
            if self.uri.startswith(_HTTP):
                ping(self.uri)
            self._check_experiment()
        except DraftsmithError:
            raise
        except Exception as error:
            reason = first_line(error)
            passes = not is_permission_error(error) and (
                LOCKED in reason or self.uri.startswith(_HTTP)
            )  # it may come back
            raise (RetryableError if passes else DraftsmithError)(self.unusable_message(error)) from error

    def unusable_message(self, error: Exception) -> str:
        """That MLflow cannot be used, why, and what to do."""
        reason = first_line(error)
        if is_permission_error(error):
            return (
                f"MLFLOW_TRACKING_URI {redacted(self.uri)}: {reason}; it refuses this user: correct user and password "
                "(in the address, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD), or ask for the right"
            )
        if LOCKED in reason:
            return f"MLflow's database {redacted(self.uri)} is locked: end what holds it"
        if SCHEMA_MISMATCH in reason:
            return (
                f"MLflow's database {redacted(self.uri)} is of another version of MLflow than is installed here: back "
                f"it up and run `mlflow db upgrade {redacted(self.uri)}`, or install the version that it is of"
            )
        if self.is_default:
            return (
                f"MLflow's database {redacted(self.uri)}: {reason}; make it writable, or restore it from a backup "
                "(moved away, it starts anew: lines, champions and runs are lost, artifacts stay)"
            )
        return (
            f"MLFLOW_TRACKING_URI {redacted(self.uri)}: {reason}; start the server, correct the variable, or unset it "
            "to use SQLite"
        )

    def open_refresh(self, name: str, params: Mapping[str, Any]) -> str | None:
        """Start the run of a refresh; None if MLflow failed. It counts as alive as long as this process lives."""
        key = secrets.token_hex(8)
        with self.best_effort():
            client, experiment = self.connect()
            self._refresh_lock.enter_context(locked(self.refresh_file(key)))
            self._refresh_files.append(self.refresh_file(key))
            tags = self._tags("refresh", key)
            self._refresh = client.create_run(experiment, run_name=name, tags=tags).info.run_id
            log_params(client, self._refresh, params)
        return self._refresh

    def close_refresh(
        self,
        status: Status,
        metrics: Mapping[str, float] | None = None,
        files: Iterable[Path] = (),
        tags: Mapping[str, str] | None = None,
        inputs: Mapping[str, ArtifactRef] | None = None,
        params: Mapping[str, str] | None = None,
    ) -> None:
        """End the refresh's run with metrics, files (the report), tags (what it came to), data sets and more params."""
        run_id, self._refresh = self._refresh, None
        with self._refresh_lock.pop_all(), self.best_effort():
            if run_id is not None:
                client, _ = self.connect()
                for tag, value in (tags or {}).items():
                    client.set_tag(run_id, tag, value)
                log_params(client, run_id, params or {})
                log_datasets(client, run_id, inputs or {})
                end_run(client, run_id, status, metrics or {}, files)
            for file in self._refresh_files:  # else the next run ends it, by the file maybe that of another host
                file.unlink(missing_ok=True)
            self._refresh_files.clear()

    def stage_run(
        self,
        parent_run_id: str | None,
        stage: str,
        key: str,
        *,
        name: str | None = None,
        params: Mapping[str, Any] | None = None,
        inputs: Mapping[str, ArtifactRef] | None = None,
    ) -> StageRun:
        """The nested run of a stage, with its config and its data sets. Call it with the key's lock held.

        An unfinished run of the same key is resumed by its id. `name` defaults to the stage's.
        """
        run = StageRun(self)
        with self.best_effort(run):
            client, experiment = self.connect()
            tags = self._tags(stage, key) | ({"mlflow.parentRunId": parent_run_id} if parent_run_id else {})
            old = self._unfinished(key)
            if old is None:
                run.run_id = client.create_run(experiment, run_name=name or stage, tags=tags).info.run_id
            else:
                run.run_id, run.resumed = old.info.run_id, True
                client.update_run(run.run_id, status="RUNNING")
                for tag, value in tags.items():
                    client.set_tag(run.run_id, tag, value)
            if old is None or not old.data.params:
                log_params(client, run.run_id, params or {})
            log_datasets(client, run.run_id, inputs or {})
        return run

    def finish_interrupted_run(self, manifest: Manifest, folder: Path) -> None:
        """Of an artifact that is there although its run has ended otherwise, when its commit was cut off."""
        run_id = manifest.mlflow_run_id
        if run_id is not None:
            with self.best_effort():
                client, _ = self.connect()
                if client.get_run(run_id).info.status in ("FAILED", "KILLED"):
                    end_run(client, run_id, "FINISHED", manifest.metrics, review_files(folder))

    def check_file_system(self) -> None:
        """Raise DraftsmithError if the database is SQLite on a network file system."""
        if (database := sqlite_file(self.uri)) is not None:
            advice = "start an MLflow server and set MLFLOW_TRACKING_URI to its address"
            check_database_disk(database, "MLflow's database", advice)

    def is_local_run(self, run: Run) -> bool:
        """Return whether a run is of this home and machine: locks say nothing about the processes of another one."""
        return bool(run.data.tags.get(HOME) == self._home)

    @property
    def had_failures(self) -> bool:
        """Whether MLflow failed while something was told."""
        return self._warned

    def refresh_file(self, key: str) -> Path:
        """The lock of a refresh, held as long as its process lives."""
        return self.folder / "refreshes" / f".lock-{key[:16]}"

    # -- inside --------------------------------------------------------------------------------------------------

    def connect(self) -> tuple[MlflowClient, str]:
        """The client and the experiment's id; migrates a database first, one process at a time.

        Of a home that may only be read, a copy of the database is read: MLflow writes to one that it opens.
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
        """Whether the database is a file that this user may only read: SQLite writes to its folder too."""
        database = sqlite_file(self.uri)
        if database is None or not database.is_file():
            return False
        return not all(os.access(path, os.W_OK) for path in (database, database.parent))

    def require_writable(self) -> None:
        """Raise DraftsmithError where nothing can be written."""
        if self.read_only:
            raise DraftsmithError(f"MLflow's database {redacted(self.uri)}: you may only read it: ask its owner")

    def _open(self, uri: str) -> tuple[MlflowClient, str]:
        for noisy in ("alembic", "mlflow"):
            logging.getLogger(noisy).setLevel(logging.WARNING)
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # its import configured it again
        if os.environ.get("DRAFTSMITH_DEBUG") != "1":  # we tell what failed, in a line and not with its traceback
            for noisy in ("mlflow.store.db", "mlflow.system_metrics"):
                logging.getLogger(noisy).setLevel(logging.CRITICAL)
        client = MlflowClient(uri, registry_uri=uri)
        try:
            return client, self._experiment(client)
        except Exception as error:
            if not self.is_default or "out-of-date database schema" not in str(error):
                raise
            upgrade_database(uri)
            return client, self._experiment(client)

    def _experiment(self, client: MlflowClient) -> str:
        name = self.experiment
        found = client.get_experiment_by_name(name)
        if found is None:
            # A server decides for itself where artifacts go; for a bare database, this home keeps them.
            location = (self.folder / "mlartifacts" / name).as_uri() if _is_db(self.uri) else None
            return client.create_experiment(name, artifact_location=location, tags=dict([_KIND]))
        return found.experiment_id

    def _check_experiment(self) -> None:
        """Raise DraftsmithError if the experiment was deleted: MLflow finds it still, and refuses runs in it.

        One that somebody else has made, or an earlier version, is marked as one of model development.
        """
        client, experiment = self.connect()
        found = client.get_experiment(experiment)
        if found.lifecycle_stage == "deleted":
            restore = (
                f"MLFLOW_TRACKING_URI={redacted(self.uri)} mlflow experiments restore --experiment-id {experiment}"
            )
            raise DraftsmithError(
                f"MLflow's experiment {self.experiment} is deleted and takes no runs: restore it (`{restore}`), or set "
                "MLFLOW_EXPERIMENT_NAME to another name"
            )
        if _KIND[0] not in found.tags:
            from mlflow.exceptions import MlflowException

            with suppress(MlflowException):  # who may only add runs is no worse off without it
                client.set_experiment_tag(experiment, *_KIND)

    def _tags(self, stage: str, key: str) -> dict[str, str]:
        return {STAGE: stage, KEY: key, HOME: self._home, **source_tags()}

    @property
    def _home(self) -> str:
        return f"{platform.node()}:{self.folder}"

    def _unfinished(self, key: str) -> Run | None:
        client, experiment = self.connect()
        wanted = f"tags.{KEY} = '{key}' and attributes.status != 'FINISHED'"
        runs = filter(self.is_local_run, client.search_runs([experiment], wanted, max_results=1000))
        return max(runs, key=lambda run: run.info.start_time, default=None)

    @contextmanager
    def best_effort(self, run: StageRun | None = None) -> Iterator[None]:
        """Swallow any failure of MLflow with one warning; the stage goes on, and its run tries again later."""
        try:
            yield
        except Exception as error:
            if run is not None:
                run.failed()
            if not self._warned:
                log.warning(
                    "MLflow at %s failed (%s): results are kept in the store, MLflow may lack a part",
                    redacted(self.uri),
                    first_line(error),
                )
            self._warned = True


class StageRun:
    """The run of one stage. Metrics are sent in batches, and kept while MLflow fails: it does not hold up the stage."""

    def __init__(self, tracking: Tracking) -> None:
        self.run_id: str | None = None
        self.resumed = False
        self._tracking = tracking
        self._buffer: list[tuple[str, float, int]] = []
        self._flushed = time.monotonic()
        self._failures = 0
        self._last_step: dict[str, int] = {}  # of a resumed run: steps that MLflow already has are not sent again

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Values of one step; they reach MLflow within `FLUSH_S` seconds of a later call, or when the run ends."""
        self._buffer += [(name, float(value), step) for name, value in values.items()]
        waited = time.monotonic() - self._flushed
        if self._failures:
            due = waited > AFTER_FAILURE_S * 2 ** min(self._failures - 1, 3)
        else:
            due = waited > FLUSH_S or len(self._buffer) >= METRICS_PER_BATCH
        if due:
            self.flush()

    @contextmanager
    def system_metrics(self) -> Iterator[None]:
        """Have MLflow's own monitor log every ten seconds what the machine does."""
        monitor = None
        if self.run_id is not None:
            with self._tracking.best_effort():
                import pynvml  # noqa: F401  # the monitor looks at GPUs if it was imported
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
        points, failures = list(self._buffer), self._failures

        def send(client: MlflowClient, run_id: str) -> None:
            log_metrics(client, run_id, [p for p in points if p[2] > self._known_step(client, run_id, p[0])])

        self._call(send)
        self._flushed = time.monotonic()
        if self._failures == failures:  # sent, or there is no run to send it to
            self._buffer, self._failures = [], 0

    def failed(self) -> None:
        """A part of what was sent may be there: what is known of the run is asked again."""
        self._failures += 1
        self.resumed = True
        self._last_step.clear()

    def close(self, status: Status, metrics: Mapping[str, float] | None = None, folder: Path | None = None) -> None:
        """End the run with its final figures and the review files of the artifact's `folder`, never its weights."""
        self.flush()

        if not self._failures:  # else `dead_runs.py` ends it, and nobody waits here once more

            def end(client: MlflowClient, run_id: str) -> None:
                end_run(client, run_id, status, metrics or {}, review_files(folder) if folder is not None else ())

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
    """Whether a server knows better than to let this user do that: no retry helps."""
    return getattr(error, "error_code", None) in ("PERMISSION_DENIED", "UNAUTHENTICATED")


def first_line(error: BaseException) -> str:
    """The first line; of SQLAlchemy's, which says where it was, the one that says what: the database's own."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return redacted(next(filter(_DATABASE_ERROR.match, lines), lines[0]))[:300]
