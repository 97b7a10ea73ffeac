"""The servers of a team for a test: PostgreSQL, an S3 stand-in (moto), MLflow, Prefect with a worker, a webhook."""

from __future__ import annotations

import http.server
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.stages.engines.servers.process import free_ports
from tests.flows.processes import ROOT, wait_until
from tests.testbed.s3 import bucket

POOL, BUCKET = "team", "mlflow"
_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")  # which the servers have, and their clients have not


def postgres_programs() -> Path | None:
    """Return the folder of `initdb` and `postgres`, which Debian keeps out of the PATH."""
    found = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    found += filter(None, [shutil.which("initdb")])
    return Path(found[-1]).resolve().parent if found else None


def ask(url: str, body: Any = None, method: str | None = None) -> Any:
    """Return the JSON of an HTTP call; POST if there is a body."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        text = answer.read()
    return json.loads(text) if text.strip() else None


@dataclass
class Team:
    """The addresses of the servers, and the environment for the team's commands and workers."""

    folder: Path
    prefect: str  # URL without /api
    mlflow: str
    s3: str
    webhook: str
    environment: dict[str, str]
    called: list[dict[str, Any]] = field(default_factory=list)  # what the webhook received

    @property
    def worker_log(self) -> str:
        return (self.folder / "worker.log").read_text()

    def api(self, path: str, body: Any = None, method: str | None = None) -> Any:
        return ask(f"{self.prefect}/api/{path}", body, method)


@contextmanager
def team(folder: Path) -> Iterator[Team]:
    """Run all servers, with a process worker for the pool, and remove everything afterwards."""
    with ExitStack() as stack:
        database = stack.enter_context(_postgres())
        called: list[dict[str, Any]] = []
        webhook = stack.enter_context(_webhook(called))
        mlflow, prefect = (f"http://127.0.0.1:{port}" for port in free_ports(2))
        stack.enter_context(bucket(BUCKET))
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
        plain |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "HOME": str(folder)}
        script = Path(sys.executable).parent
        run = _Running(folder, stack)
        bus = {
            "PREFECT_HOME": str(folder / "prefect"),
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
        }
        serving = {
            "PREFECT_API_DATABASE_CONNECTION_URL": database("prefect").replace("postgresql", "postgresql+asyncpg", 1),
            "PREFECT_SERVER_UI_API_URL": f"{prefect}/api",
            "PREFECT_UI_URL": prefect,  # what a webhook links to
        }
        run("prefect", [script / "prefect", "server", "start", "--port", _port(prefect)], plain | bus | serving)
        runs = database("mlflow").replace("postgresql", "postgresql+psycopg2", 1)
        tracking = ["--backend-store-uri", runs, "--artifacts-destination", f"s3://{BUCKET}"]
        run(
            "mlflow",
            [script / "mlflow", "server", *tracking, "--port", _port(mlflow), "--workers", "1"],
            plain | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"},
        )
        without_keys = {name: value for name, value in plain.items() if name not in _KEYS}
        environment = without_keys | bus | {
            "PREFECT_API_URL": f"{prefect}/api",
            "MLFLOW_TRACKING_URI": mlflow,
            "DRAFTSMITH_HOME": str(folder / "home"),
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PYTHONPATH": os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)]),
        }  # fmt: skip
        wait_until(lambda: _answers(f"{prefect}/api/health"), "Prefect's server answers", limit_s=120)
        ask(f"{prefect}/api/work_pools/", {"name": POOL, "type": "process"})
        run("worker", [script / "prefect", "worker", "start", "--pool", POOL, "--type", "process"], environment)
        wait_until(lambda: _answers(f"{mlflow}/health"), "MLflow's server answers", limit_s=120)
        yield Team(folder, prefect, mlflow, plain["AWS_ENDPOINT_URL"], webhook, environment, called)


class _Running:
    """Starts servers, each in a new session with a log, and ends them with the stack."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack

    def __call__(self, name: str, command: list[str | Path], environment: dict[str, str]) -> None:
        log = self._stack.enter_context((self._folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            list(map(str, command)), stdout=log, stderr=log, env=environment, start_new_session=True, cwd=self._folder
        )
        self._stack.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)


@contextmanager
def _postgres() -> Iterator[Callable[[str], str]]:
    """Yield a function that creates a database and returns its URL. Under root, PostgreSQL runs as another user."""
    programs = postgres_programs()
    assert programs is not None
    user = pwd.getpwnam("postgres").pw_name if os.getuid() == 0 else None
    folder, (port,) = Path(tempfile.mkdtemp(prefix="draftsmith-postgres-")), free_ports(1)
    if user is not None:
        shutil.chown(folder, user)
    options: dict[str, Any] = {"user": user, "cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = None
    try:
        subprocess.run(
            [programs / "initdb", "-D", folder / "data", "-U", "team", "-A", "trust", "--no-sync"],
            check=True,
            **options,
        )
        settings = ["-c", "fsync=off", "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}"]
        server = subprocess.Popen(
            [programs / "postgres", "-D", folder / "data", "-p", str(port), *settings],
            start_new_session=True,
            **options,
        )
        ready: list[str | Path] = [programs / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
        wait_until(lambda: subprocess.run(ready, check=False, **options).returncode == 0, "PostgreSQL answers")

        def database(name: str) -> str:
            where = ["-h", "127.0.0.1", "-p", str(port), "-U", "team"]
            subprocess.run([programs / "createdb", *where, name], check=True, **options)
            return f"postgresql://team@127.0.0.1:{port}/{name}"

        yield database
    finally:
        if server is not None:
            server.send_signal(signal.SIGQUIT)  # at once: nothing of it is kept
            server.wait(20)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _webhook(called: list[dict[str, Any]]) -> Iterator[str]:
    class Receiver(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            called.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_arguments: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/told"
    finally:
        server.shutdown()


def _port(url: str) -> str:
    return url.rpartition(":")[2]


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        time.sleep(0.1)
        return False
    return True
