"""Real MLflow and Prefect servers that are lost while a stage runs, and come back or do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from draftsmith.stages.engines.servers.process import free_ports
from tests.faults.scene import WORKING, Play, Scene, must
from tests.faults.watch import until

_START_LIMIT_S = 120.0
_BACK_S = (1.0, 10.0)  # how long it is down
_IMPATIENT = ("--set", "stages.retries=1")


class Server:
    """A server's process group on one port, which can be killed and started again."""

    def __init__(self, command: Sequence[str], port: int, health: str, folder: Path) -> None:
        self._command, self._folder = command, folder
        self.url = f"http://127.0.0.1:{port}"
        self._health = f"{self.url}{health}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, and return when it answers."""
        quiet = {"PREFECT_HOME": str(self._folder / "prefect"), "PREFECT_SERVER_ANALYTICS_ENABLED": "false"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", *self._command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **quiet, "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "1"},
            )
        until(self._answers, _START_LIMIT_S)

    def kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None

    def _answers(self) -> bool:
        with suppress(OSError), urllib.request.urlopen(self._health, timeout=2):
            return True
        return False


@contextmanager
def mlflow_server(folder: Path, url: str | None = None) -> Iterator[Server]:
    """Run MLflow's server. url: of a free port here; None: any."""
    (port,) = free_ports(1) if url is None else [int(url.rpartition(":")[2])]
    stored = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/files"]
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *stored]
    yield from _running(Server(command, port, "/health", folder))


@contextmanager
def prefect_server(folder: Path) -> Iterator[Server]:
    (port,) = free_ports(1)
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    yield from _running(Server(command, port, "/api/health", folder))


def _running(server: Server) -> Iterator[Server]:
    try:  # it may be interrupted while it starts
        server.start()
        yield server
    finally:
        server.kill()


_KINDS = {
    "MLflow": (mlflow_server, "MLFLOW_TRACKING_URI", ""),
    "Prefect": (prefect_server, "PREFECT_API_URL", "/api"),
}
"""What starts a server, and the variable that names it and the path of its API."""


@contextmanager
def _serving(kind: str, scene: Scene) -> Iterator[tuple[Server, dict[str, str]]]:
    """Run a server for the scene's commands. Yields it, and what names it in their environment."""
    serve, variable, path = _KINDS[kind]
    with serve(scene.home.folder) as server:
        yield server, {variable: server.url + path}


def lost_for_a_while(kind: str, scene: Scene) -> None:
    """Kill the server while the stage works, and start it again: the command succeeds."""
    with _serving(kind, scene) as (server, variables):
        running = scene.start(**variables)
        scene.reach(running, [WORKING])
        server.kill()
        time.sleep(scene.chance.uniform(*_BACK_S))
        server.start()
        scene.finished(running.wait())


def lost_for_good(kind: str, scene: Scene) -> None:
    """Kill the server while the stage works, and check that the stage loses nothing."""
    with _serving(kind, scene) as (server, variables):
        running = scene.start(**variables)
        scene.reach(running, [WORKING])
        server.kill()
        ended = scene.check_end(running.wait(), [0, 75])
        must(ended.message, "the lost server was not reported")
        scene.nothing_left()
        server.start()
        again = scene.refresh(**variables)
        scene.finished(again)
        must(scene.node not in again.nodes("started"), f"{scene.node} was made again although it was complete")


def away(kind: str, scene: Scene) -> None:
    """Start the refresh while the server is down."""
    with _serving(kind, scene) as (server, variables):
        server.kill()
        scene.check_end(scene.refresh(*_IMPATIENT, **variables), [75], *variables)
        scene.nothing_left()
        server.start()
        scene.finished(scene.refresh(**variables))


FAULTS: dict[str, Play] = {
    f"{kind}'s server {what}": partial(play, kind)
    for kind in _KINDS
    for what, play in (
        ("lost, then back", lost_for_a_while), ("lost for good", lost_for_good), ("away at the start", away),
    )
}  # fmt: skip
