"""Settings of MLflow's client, a check that its server answers, and access to SQLite databases."""

from __future__ import annotations

import atexit
import os
import re
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from urllib.parse import quote

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.host import network_file_system

_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"  # read by MLflow at every request
_WEIGHTS_S = 1800  # for gigabytes: a server in front of a bucket answers only after its own upload
_PING_S = 5.0
_timeout_lock = threading.Lock()


def configure() -> None:
    """Set MLflow's environment variables, unless they are set. Call this before mlflow is imported.

    Time-outs are short, since a stage waits for the requests: a silent server fails within a minute.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # URL of each ended run, with the password
    os.environ.setdefault(_TIMEOUT, "15")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")


@contextmanager
def weights_timeout() -> Iterator[None]:
    """Raise the time-out of requests in the body, for uploads and downloads of weights.

    The time-out belongs to the process. So a lock serializes users of this function, and meanwhile requests of other
    threads have the long time-out too.
    """
    with _timeout_lock:
        before = os.environ.get(_TIMEOUT)
        os.environ[_TIMEOUT] = str(max(_WEIGHTS_S, int(before or 0)))
        try:
            yield
        finally:
            if before is None:
                del os.environ[_TIMEOUT]
            else:
                os.environ[_TIMEOUT] = before


def ping(uri: str) -> None:
    """Send a request to a server with MLflow's own credentials, proxies and certificates; any status will do.

    Raises ConnectionError with the system's message.
    """
    configure()  # before mlflow is imported, which takes seconds and which planning does not need
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        http_request(get_default_host_creds(uri), "", "GET", max_retries=0, timeout=_PING_S, raise_on_status=False)
    except MlflowException as error:
        first = _first_cause(error)
        raise ConnectionError(str(first) or type(first).__name__) from error


def _first_cause(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def check_database_disk(path: Path, name: str, advice: str) -> None:
    """Raise DraftsmithError if a path for an SQLite database is on a network file system."""
    if (shared := network_file_system(path)) is not None:
        raise DraftsmithError(
            f"{name} {path} is on a network file system ({shared}), where SQLite's locks fail and data are lost. "
            f"{advice}, or set DRAFTSMITH_HOME to a folder on a local disk."
        )


def sqlite_file(uri: str) -> Path | None:
    """Return the file of an SQLite address; None for another database, or one in memory."""
    match = re.fullmatch(r"sqlite(?:\+\w+)?:///(?!:memory:)([^?]+)(?:\?.*)?", uri)
    return Path(match.group(1)) if match else None


def copy_database(uri: str) -> Path:
    """Return a copy of an SQLite database, which is deleted when this process ends. Opens the original read-only."""
    folder = Path(tempfile.mkdtemp(prefix="draftsmith-read-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with (
        closing(sqlite3.connect(f"file:{quote(str(sqlite_file(uri)))}?mode=ro", uri=True)) as source,
        closing(sqlite3.connect(folder / "copy.db")) as target,
    ):
        source.backup(target)
    return folder / "copy.db"
