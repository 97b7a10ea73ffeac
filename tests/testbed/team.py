"""The servers of a team for a test: PostgreSQL, an S3 stand-in (moto), MLflow, Prefect with a worker, a webhook.

MLflow, Prefect and the worker run with the commands and environments of `configs/team/compose.yaml`.
"""

from __future__ import annotations

import base64
import http.server
import json
import os
import pwd
import secrets
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.stages.engines.servers.process import free_ports
from tests.flows.processes import ROOT, wait_until
from tests.testbed.compose import compose, secret_names
from tests.testbed.s3 import bucket

POOL, BUCKET = "draftsmith", "mlflow"
_INHERITED = ("PATH", "PYTHONPATH", "OMP_NUM_THREADS", "DRAFTSMITH_DEVICE_LOCKS")


def postgres_programs() -> Path | None:
    """Return the folder of `initdb` and `postgres`, which Debian keeps out of the PATH."""
    found = [str(path) for path in sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))]
    found += filter(None, [shutil.which("initdb")])
    return Path(found[-1]).resolve().parent if found else None


def ask(url: str, body: Any = None, method: str | None = None, user: str | None = None) -> Any:
    """Return the JSON of an HTTP call; POST if there is a body. user: `NAME:PASSWORD`."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    if user is not None:
        request.add_header("Authorization", f"Basic {base64.b64encode(user.encode()).decode()}")
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
    postgres: str  # HOST:PORT
    secrets: dict[str, str]  # of the file .env
    environment: dict[str, str]
    called: list[dict[str, Any]] = field(default_factory=list)  # what the webhook received

    @property
    def worker_log(self) -> str:
        return (self.folder / "worker.log").read_text()

    @property
    def user(self) -> str:
        """Return name and password of Prefect's user."""
        return self.environment["PREFECT_API_AUTH_STRING"]

    def api(self, path: str, body: Any = None, method: str | None = None) -> Any:
        return ask(f"{self.prefect}/api/{path}", body, method, self.user)


@contextmanager
def team(folder: Path) -> Iterator[Team]:
    """Run all servers, with a process worker for the pool, and remove everything afterwards."""
    with ExitStack() as stack:
        passwords = {name: secrets.token_hex(16) for name in secret_names()}
        called: list[dict[str, Any]] = []
        webhook = stack.enter_context(_webhook(called))
        ports = free_ports(3)
        addresses = {
            name: f"127.0.0.1:{port}" for name, port in zip(("postgres", "prefect", "mlflow"), ports, strict=True)
        }
        stack.enter_context(bucket(BUCKET))
        storage = os.environ["AWS_ENDPOINT_URL"]
        here = {
            "postgres:5432": addresses["postgres"],
            "http://s3:9000": storage,
            "0.0.0.0": "127.0.0.1",
            "--port 5000": f"--port {ports[2]}",
            "/var/lib/prefect": str(folder / "prefect"),
            "/etc/": f"{folder}/",
            "/srv/draftsmith": str(folder / "home"),
        }
        known = {f"{name.upper()}_URL": f"http://{addresses[name]}" for name in ("prefect", "mlflow")}
        file = compose({**passwords, **known, "MLFLOW_HOSTS": "127.0.0.1:*"}, here)
        services = file["services"]
        for name, config in file["configs"].items():
            (folder / name).write_text(config["content"])
        for config in services["mlflow"]["configs"]:
            shutil.copy(folder / config["source"], config["target"])
        stack.enter_context(_postgres(services["postgres"]["environment"], ports[0], folder / "databases"))
        # of this process only what finds programs and packages
        plain = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        plain["PATH"] = f"{Path(sys.executable).parent}:{plain['PATH']}"
        plain |= {"no_proxy": "127.0.0.1", "NO_PROXY": "127.0.0.1", "HOME": str(folder)}
        run = _Running(folder, stack)

        def serve(name: str, **more: str) -> dict[str, str]:
            environment = plain | services[name]["environment"] | more
            run(name, shlex.split(services[name]["command"]), environment)
            return environment

        prefect, mlflow = (f"http://{addresses[name]}" for name in ("prefect", "mlflow"))
        serve("prefect", PREFECT_SERVER_API_PORT=str(ports[1]))  # which a container publishes as another one
        serve("mlflow")
        wait_until(lambda: _answers(f"{prefect}/api/health"), "Prefect's server answers", limit_s=120)
        user = services["worker"]["environment"]["PREFECT_API_AUTH_STRING"]
        ask(f"{prefect}/api/work_pools/", {"name": POOL, "type": "process"}, user=user)
        path = os.pathsep.join([*filter(None, [os.environ.get("PYTHONPATH")]), str(ROOT)])
        environment = serve("worker", PREFECT_WORKER_QUERY_SECONDS="1", PYTHONPATH=path)
        wait_until(lambda: _answers(f"{mlflow}/health"), "MLflow's server answers", limit_s=120)
        yield Team(folder, prefect, mlflow, storage, webhook, addresses["postgres"], passwords, environment, called)


class _Running:
    """Starts servers, each in a new session with a log, and ends them with the stack."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack

    def __call__(self, name: str, command: list[str], environment: dict[str, str]) -> None:
        log = self._stack.enter_context((self._folder / f"{name}.log").open("wb"))
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=environment, start_new_session=True, cwd=self._folder
        )
        self._stack.callback(_end, process)


def _end(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)


@contextmanager
def _postgres(service: dict[str, str], port: int, first: Path) -> Iterator[None]:
    """Run PostgreSQL as its image does: one user with a password, one database, and the file `first` on a new disk.

    Under root it runs as another user.
    """
    programs = postgres_programs()
    assert programs is not None
    owner = pwd.getpwnam("postgres").pw_name if os.getuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="draftsmith-postgres-"))
    user, password, database = (service[f"POSTGRES_{name}"] for name in ("USER", "PASSWORD", "DB"))
    (folder / "password").write_text(password)
    if owner is not None:
        for path in (folder, folder / "password"):
            shutil.chown(path, owner)
    where = {"PGHOST": "127.0.0.1", "PGPORT": str(port), "PGUSER": user, "PGPASSWORD": password}
    options: dict[str, Any] = {
        "user": owner, "cwd": folder, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL,
        "env": {**os.environ, **where},
    }  # fmt: skip
    server = None
    try:
        access = ["-U", user, "-A", "scram-sha-256", f"--pwfile={folder / 'password'}", "--no-sync"]
        subprocess.run([programs / "initdb", "-D", folder / "data", *access], check=True, **options)
        settings = ["-c", "fsync=off", "-c", "listen_addresses=127.0.0.1", "-c", f"unix_socket_directories={folder}"]
        server = subprocess.Popen(
            [programs / "postgres", "-D", folder / "data", "-p", str(port), *settings],
            start_new_session=True,
            **options,
        )
        ready = programs / "pg_isready"
        wait_until(lambda: subprocess.run([ready], check=False, **options).returncode == 0, "PostgreSQL answers")
        subprocess.run([programs / "createdb", database], check=True, **options)
        subprocess.run([programs / "psql", "-d", database, "-c", first.read_text()], check=True, **options)
        yield
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


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except OSError:
        time.sleep(0.1)
        return False
    return True
