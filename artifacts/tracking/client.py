"""MLflow's client: its settings, whether its server answers, and how long it waits where weights are sent."""

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
_WEIGHTS_S = 1800  # for a file of gigabytes: a server in front of a bucket answers when its own copy is done
_timeout_lock = threading.Lock()


def configure() -> None:
    """Set what MLflow reads from the environment, where that does not say otherwise. Call it before mlflow is imported.

    Requests are short, and a stage waits for them: a server that is silent is given up within a minute.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault(_TIMEOUT, "15")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")


@contextmanager
def weights_timeout() -> Iterator[None]:
    """Wait for the server's answer as long as the largest file takes, in here. A repetition sends it whole once more,
    so there are no more of them than elsewhere.

    The setting is the process's: others who wait for it come one after the other, and a request of another thread is
    given up as late meanwhile.
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


def ping(uri: str, timeout_s: float = 5.0) -> None:
    """Ask a server as MLflow does: with its user and password, proxies and certificates. Any answer will do, whatever
    its status: MLflow then says what it thinks of it. Raises ConnectionError with what the system says of it."""
    configure()
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:
        http_request(get_default_host_creds(uri), "", "GET", max_retries=0, timeout=timeout_s, raise_on_status=False)
    except MlflowException as error:
        first = _first_cause(error)
        raise ConnectionError(str(first) or type(first).__name__) from error


def _first_cause(error: BaseException) -> BaseException:
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    return error


def check_database_disk(path: Path, whose: str, advice: str) -> None:
    """Raise DraftsmithError if a database of SQLite would lie on a network file system."""
    if (shared := network_file_system(path)) is not None:
        raise DraftsmithError(
            f"{whose} {path} lies on a network file system ({shared}), where SQLite's locks fail and data are lost: "
            f"{advice}, or point DRAFTSMITH_HOME at a local disk"
        )


def sqlite_file(uri: str) -> Path | None:
    """The file of a database's address; None for another kind of database, or one in memory."""
    found = re.fullmatch(r"sqlite(?:\+\w+)?:///(?!:memory:)([^?]+)(?:\?.*)?", uri)
    return Path(found.group(1)) if found else None


def copy_database(uri: str) -> Path:
    """What the database of an address holds now, in a folder that goes with this process. Nothing is written there."""
    folder = Path(tempfile.mkdtemp(prefix="draftsmith-read-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with (
        closing(sqlite3.connect(f"file:{quote(str(sqlite_file(uri)))}?mode=ro", uri=True)) as there,
        closing(sqlite3.connect(folder / "copy.db")) as here,
    ):
        there.backup(here)
    return folder / "copy.db"
