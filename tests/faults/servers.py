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
from pathlib import Path

from tests.faults.scene import WORKING, Play, Scene, must
from tests.faults.watch import until
from tests.testbed.team import free_port

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
def mlflow_server(folder: Path) -> Iterator[Server]:
    port = free_port()
    stored = ["--backend-store-uri", f"sqlite:///{folder}/server.db", "--artifacts-destination", f"{folder}/files"]
    command = ["mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", *stored]
    yield from _running(Server(command, port, "/health", folder))


@contextmanager
def prefect_server(folder: Path) -> Iterator[Server]:
    port = free_port()
    command = ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port), "--no-ui"]
    yield from _running(Server(command, port, "/api/health", folder))


def _running(server: Server) -> Iterator[Server]:
    try:  # it may be interrupted while it starts
        server.start()
        yield server
    finally:
        server.kill()


def _lost(scene: Scene, server: Server, *, back: bool, **variables: str) -> None:
    """Kill the server while the stage works, and check that the stage loses nothing.

    With the server started again, the same command succeeds.
    """
    running = scene.start(**variables)
    scene.reach(running, [WORKING])
    server.kill()
    if back:
        time.sleep(scene.chance.uniform(*_BACK_S))
        server.start()
        scene.finished(running.wait())
        return
    ended = running.wait()
    scene.check_end(ended, [0, 75])
    must(ended.message, "the lost server was not reported")
    scene.nothing_left()
    server.start()
    again = scene.refresh(**variables)
    scene.finished(again)
    must(scene.node not in again.nodes("started"), f"{scene.node} was made again although it was complete")


def mlflow_back(scene: Scene) -> None:
    with mlflow_server(scene.home.folder) as server:
        _lost(scene, server, back=True, MLFLOW_TRACKING_URI=server.url)


def mlflow_gone(scene: Scene) -> None:
    with mlflow_server(scene.home.folder) as server:
        _lost(scene, server, back=False, MLFLOW_TRACKING_URI=server.url)


def prefect_back(scene: Scene) -> None:
    with prefect_server(scene.home.folder) as server:
        _lost(scene, server, back=True, PREFECT_API_URL=f"{server.url}/api")


def prefect_gone(scene: Scene) -> None:
    with prefect_server(scene.home.folder) as server:
        _lost(scene, server, back=False, PREFECT_API_URL=f"{server.url}/api")


def mlflow_away(scene: Scene) -> None:
    """Start the refresh while the server is down."""
    with mlflow_server(scene.home.folder) as server:
        server.kill()
        scene.check_end(scene.refresh(*_IMPATIENT, MLFLOW_TRACKING_URI=server.url), [75], "MLFLOW_TRACKING_URI")
        scene.nothing_left()
        server.start()
        scene.finished(scene.refresh(MLFLOW_TRACKING_URI=server.url))


def prefect_away(scene: Scene) -> None:
    with prefect_server(scene.home.folder) as server:
        server.kill()
        api = f"{server.url}/api"
        scene.check_end(scene.refresh(*_IMPATIENT, PREFECT_API_URL=api), [75], "PREFECT_API_URL")
        scene.nothing_left()
        server.start()
        scene.finished(scene.refresh(PREFECT_API_URL=api))


FAULTS: dict[str, Play] = {
    "MLflow's server lost, then back": mlflow_back,
    "MLflow's server lost for good": mlflow_gone,
    "MLflow's server away at the start": mlflow_away,
    "Prefect's server lost, then back": prefect_back,
    "Prefect's server lost for good": prefect_gone,
    "Prefect's server away at the start": prefect_away,
}
