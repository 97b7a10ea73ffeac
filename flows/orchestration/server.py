"""Prefect's settings for this home, and the temporary server, which never outlives this process."""

from __future__ import annotations

import atexit
import contextlib
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NoReturn

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, from_os_error
from draftsmith.artifacts.locks import locked
from draftsmith.artifacts.tracking.client import check_database_disk, sqlite_file
from draftsmith.stages.runtime.child_process import ChildProcess, project_environment

_START_LIMIT_S = 180.0  # 3 s on a used home, 8 to 12 s on a new one, more on a busy machine
_NOTICE_AFTER_S = 4.0  # wait before a notice
_STOP_LIMIT_S = 5.0
# uvicorn with relaxed garbage collection, as importing Prefect's server dominates its start
_UVICORN = (
    "import runpy; from draftsmith.stages.runtime.memory import relax_gc; relax_gc(); "
    "runpy.run_module('uvicorn', run_name='__main__', alter_sys=True)"
)
Say = Callable[[str], None]
_temporary: dict[str, ChildProcess] = {}  # servers that this process started, by URL


def prepare(home: Path) -> None:
    """Set the environment that Prefect reads when it is imported, except for what the user has set."""
    debug = os.environ.get("DRAFTSMITH_DEBUG") == "1"
    defaults = {
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",  # telemetry of Prefect's client
        "PREFECT_LOGGING_EXTRA_LOGGERS": "draftsmith",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO" if debug else "CRITICAL",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",  # our own log lines before and after the flow
        # Retries of a call to an unreachable API, from 2 s, doubling, with jitter: about two minutes. A temporary
        # server that has died does not come back.
        "PREFECT_CLIENT_MAX_RETRIES": "6" if os.environ.get("PREFECT_API_URL") else "3",
        "PREFECT_INTERNAL_LOGGING_LEVEL": "ERROR"
        if debug
        else "CRITICAL",  # else it logs every event that it cannot send
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def leave(code: int) -> NoReturn:
    """End this process without waiting for Prefect, which would try to send events to a lost server for minutes."""
    sys.stdout.flush()
    sys.stderr.flush()
    for server in _temporary.values():
        server.end(_STOP_LIMIT_S)
    os._exit(code)


@contextlib.contextmanager
def prefect_server(home: Path) -> Iterator[Callable[[Say], None]]:
    """Start a server that ends with this process, unless `PREFECT_API_URL` names one. Yield a function to wait for it.

    Enter it before Prefect is imported, and call the function before the flow. It calls its argument if the wait
    takes a while. It raises DraftsmithError if the server has ended, RetryableError if it may answer later.

    The temporary server has its own session, so Ctrl-C does not reach it and a flow can still report its end. It stops
    at exit, after Prefect has sent its last events and log lines. Other users of this machine can reach its port, so it
    has a password, which this process and its children have in their environment.
    """
    prepare(home)
    if existing := os.environ.get("PREFECT_API_URL"):
        yield lambda _say: _must_answer(existing)
        return
    folder, log_path = home / "prefect", home / "logs" / "prefect-server.log"
    check_database_location(home)
    with contextlib.ExitStack() as starting:
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            log = starting.enter_context(log_path.open("ab"))
            # two servers that start on one new database would race in its migrations
            starting.enter_context(locked(folder / ".lock-start"))
        except OSError as error:
            raise from_os_error(error, "starting Prefect's server: writing") from error
        port, user = _free_port(), f"draftsmith:{secrets.token_urlsafe(32)}"
        server = _start(port, user, log)
        atexit.register(server.end, _STOP_LIMIT_S)
        url = f"http://127.0.0.1:{port}/api"
        os.environ |= {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": user}
        _temporary[url] = server
        try:
            yield lambda say: _wait_until_healthy(server.process, url, log_path, say)
        except BaseException:  # an error of the plan does not wait for the server
            server.end()
            raise


def permanent_server(home: Path) -> str:
    """Return `PREFECT_API_URL` after checking that its server answers. Call it before Prefect is imported.

    Raises DraftsmithError if the variable is not set or the server does not answer.
    """
    url = os.environ.get("PREFECT_API_URL")
    if not url:
        raise DraftsmithError(
            "PREFECT_API_URL is not set, and a deployment needs a permanent Prefect server. Start one with `prefect "
            "server start`, and set the variable to its URL with /api."
        )
    prepare(home)
    _must_answer(url)
    return url


def uses_temporary_server() -> bool:
    """Return whether this process reports to its own temporary server."""
    return os.environ.get("PREFECT_API_URL") in (None, *_temporary)


def check_database_location(home: Path) -> None:
    """Raise DraftsmithError if a server started here would keep its runs in SQLite on a network file system."""
    if os.environ.get("PREFECT_API_URL"):
        return
    names = ("PREFECT_API_DATABASE_CONNECTION_URL", "PREFECT_SERVER_DATABASE_CONNECTION_URL")
    address = next((value for name in names if (value := os.environ.get(name))), None)
    folder = Path(os.environ.get("PREFECT_HOME") or home / "prefect").expanduser()
    if (database := sqlite_file(address) if address else folder / "prefect.db") is not None:
        advice = "Start a Prefect server and set PREFECT_API_URL to its address"
        check_database_disk(database, "Prefect's database", advice)


def _must_answer(url: str) -> None:
    """Raise RetryableError if Prefect's server does not answer, and DraftsmithError if it refuses this user."""
    import httpx
    from prefect.client.orchestration import get_client  # after `prepare` has set Prefect's environment

    try:
        with get_client(sync_client=True) as client:
            client.read_flows(limit=1)  # needs the password, unlike /health
    except Exception as error:
        if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403):
            raise DraftsmithError(
                f"PREFECT_API_URL: {url} refuses this user. Set PREFECT_API_AUTH_STRING to USER:PASSWORD of that "
                "server (Prefect Cloud: PREFECT_API_KEY)."
            ) from error
        raise RetryableError(
            f"PREFECT_API_URL: {url} does not answer ({' '.join(str(error).split())}). Start that server or "
            "correct the variable; without it a run starts its own server."
        ) from error


def _start(port: int, user: str, log: IO[bytes]) -> ChildProcess:
    """Start the server as Prefect starts it for a flow without an API. user: who may use it, as `NAME:PASSWORD`."""
    uvicorn = ["--factory", "prefect.server.api.server:create_app", "--host", "127.0.0.1", "--port", str(port)]
    return ChildProcess(
        [sys.executable, "-P", "-c", _UVICORN, *uvicorn, "--log-level", "error", "--lifespan", "on"],
        environment={
            **project_environment(),
            "PREFECT_SERVER_API_AUTH_STRING": user,
            "PREFECT_UI_ENABLED": "0",
            "PREFECT__SERVER_EPHEMERAL": "1",
            "PREFECT__SERVER_FINAL": "1",
        },
        stdout=log,
        stderr=log,
    )


def _wait_until_healthy(process: subprocess.Popen[bytes], url: str, log_path: Path, say: Say) -> None:
    start, notified = time.monotonic(), False
    while (waited := time.monotonic() - start) < _START_LIMIT_S:
        if waited >= _NOTICE_AFTER_S and not notified:
            say(f"waiting for Prefect's server, for {_START_LIMIT_S:.0f} s at most (log: {log_path})")
            notified = True
        if process.poll() is not None:
            raise DraftsmithError(
                f"Prefect's temporary server has ended. See {log_path}; if its database is damaged, move "
                f"{log_path.parents[1] / 'prefect' / 'prefect.db'} away (it has no results, and a new one is made)."
            )
        with contextlib.suppress(urllib.error.URLError, OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
            return
        time.sleep(0.1)
    raise RetryableError(  # the machine may be busy
        f"Prefect's temporary server did not start within {_START_LIMIT_S:.0f} s (log: {log_path}). Run the command "
        "again, or `prefect server start` in another terminal with PREFECT_API_URL set."
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
