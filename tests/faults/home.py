"""The command in its own home, started as a user would start it, and the content of the home afterwards."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.artifacts.locks import is_locked
from draftsmith.artifacts.store.local import SHORT, Store
from tests.flows.processes import ROOT, processes_of

_LINE = re.compile(r"^([a-z][a-z0-9-]*): (reused|started|done in .*)$")
_KEPT = re.compile(r"(\d+) (?:answers|\w+) of an earlier attempt kept|checkpoint at step (\d+)")
LIMIT_S = 600.0  # for one command: many times its usual duration
SERVER = "FAULTS_PREFECT"  # environment variable: the address of a Prefect server that all commands share


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str
    seconds: float

    def nodes(self, what: str) -> list[str]:
        """Return the nodes that were `reused`, `started` or `done`, in the order of the lines."""
        lines = (_LINE.match(line) for line in self.out.splitlines())
        return [match[1] for match in lines if match is not None and match[2].startswith(what)]

    @property
    def message(self) -> str:
        """Return the error line, else the last warning; empty if the command printed neither."""
        lines = [line for line in self.err.splitlines() if line.startswith("draftsmith: ")]
        lines += [line for line in self.out.splitlines() if line.startswith("warning: ")]
        errors = [line for line in lines if line.startswith("draftsmith: error: ")]
        return (errors or lines or [""])[-1]

    @property
    def kept(self) -> int | None:
        """Return how many saved answers or steps the last stage continued from; None if not reported."""
        matches = _KEPT.findall(self.out)
        return int(matches[-1][0] or matches[-1][1]) if matches else None


@dataclass
class Running:
    """A running command in its own session. Its output goes to files, which no fault can block."""

    process: subprocess.Popen[bytes]
    folder: Path
    started: float = field(default_factory=time.monotonic)

    def wait(self, limit_s: float = LIMIT_S) -> Ended:
        """Wait for the end. If the command does not end, kill it and raise subprocess.TimeoutExpired."""
        try:
            code = self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            raise
        out, err = ((self.folder / name).read_text("utf-8", errors="replace") for name in ("stdout", "stderr"))
        return Ended(code, out, err, time.monotonic() - self.started)


@dataclass(frozen=True)
class Home:
    """A folder with a config, its input files, and the DRAFTSMITH_HOME `home`."""

    folder: Path
    config: Path

    @property
    def path(self) -> Path:
        return self.folder / "home"

    @property
    def devices(self) -> Path:
        """Return the folder of device locks. It is separate, so that other work on the machine is not waited for."""
        return self.folder / "devices"

    @property
    def _environment(self) -> dict[str, str]:
        own = {"DRAFTSMITH_HOME": str(self.path), "DRAFTSMITH_DEVICE_LOCKS": str(self.devices)}
        server = {"PREFECT_API_URL": os.environ[SERVER]} if SERVER in os.environ else {}
        return {**own, **server, "OMP_NUM_THREADS": "1"}

    @property
    def store(self) -> Store:
        return Store(self.path / "store")

    def start(self, *arguments: str | Path, output: str = "output", **variables: str) -> Running:
        """Start `draftsmith run CONFIG ARGUMENTS`.

        output: name of a folder for the output, for two concurrent commands. variables: of the environment; an empty
        one is left out.
        """
        folder = self.folder / output
        folder.mkdir(exist_ok=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "DRAFTSMITH_"))}
        with (folder / "stdout").open("wb") as out, (folder / "stderr").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "draftsmith.flows", "run", str(self.config), *map(str, arguments)],
                cwd=ROOT,
                env={**environment, **{k: v for k, v in (self._environment | variables).items() if v}},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,
                # a background job of a script inherits an ignored SIGINT; a terminal's command does not
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        return Running(process, folder)

    def refresh(self, *arguments: str | Path, **variables: str) -> Ended:
        """Run `draftsmith run CONFIG ARGUMENTS` to its end."""
        return self.start(*arguments, **variables).wait()

    # ---- content of the home

    def content_ids(self) -> dict[str, str]:
        """Return `STAGE/KEY` (first digits of the key) -> content id, of every complete artifact."""
        return {f"{m.stage}/{m.key[:SHORT]}": m.content_id for m in self.store.list()}

    def folder_of(self, artifact: str) -> Path:
        """Return the folder of the artifact `STAGE/KEY`."""
        stage, key = artifact.split("/")
        return self.store.path(stage, key)

    def partial_of(self, artifact: str) -> Path:
        stage, key = artifact.split("/")
        return self.store.partial_path(stage, key)

    def config_of(self, artifact: str) -> dict[str, Any]:
        """Return the config in the last request to the stage that makes the artifact."""
        stage, key = artifact.split("/")
        request = max(self.path.glob(f"logs/{stage}-{key}-*.request.json"))
        config: dict[str, Any] = json.loads(request.read_text("utf-8"))["config"]
        return config

    def drop(self, artifact: str) -> None:
        """Remove an artifact."""
        shutil.rmtree(self.folder_of(artifact))

    def processes(self) -> list[int]:
        return processes_of(self.path)

    def locked_files(self) -> list[Path]:
        """Return the lock files that a living process has locked."""
        files = [*self.path.rglob(".lock*"), *self.devices.glob("*.lock")]
        return [path for path in files if path.is_file() and is_locked(path)]

    def runs_running(self) -> list[str]:
        """Return the names of the runs that are running according to MLflow's database."""
        with closing(sqlite3.connect(self.path / "mlflow.db")) as database:
            return [name for (name,) in database.execute("select name from runs where status = 'RUNNING'")]

    def versions(self) -> list[list[str]]:
        """Return number and aliases of each version of the line, from MLflow's database."""
        if not (self.path / "mlflow.db").exists():
            return []
        with closing(sqlite3.connect(self.path / "mlflow.db")) as database:
            numbers = database.execute("select version from model_versions order by version").fetchall()
            aliases = database.execute("select version, alias from registered_model_aliases order by alias").fetchall()
        return [[str(n), *(alias for version, alias in aliases if str(version) == str(n))] for (n,) in numbers]

    def litter(self) -> list[Path]:
        """Return what a finished refresh must not leave in the store: attempts, replaced artifacts, temporary files."""
        root = self.store.root
        names = ("*/.partial-*", "*/.replaced-*", "**/.tmp-*")
        return [path for name in names for path in root.glob(name) if not _empty(path)]


def _empty(path: Path) -> bool:
    return path.is_dir() and not any(each.is_file() for each in path.rglob("*"))


def copied(source: Path, folder: Path) -> None:
    """Replace `folder` by a copy of `source`."""
    shutil.rmtree(folder, ignore_errors=True)
    copied_into(source, folder)


def copied_into(source: Path, folder: Path) -> None:
    """Copy into an empty folder that must stay because a disk is mounted there."""
    shutil.copytree(source, folder, symlinks=True, dirs_exist_ok=True)
