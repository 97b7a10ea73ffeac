"""Starts and watches real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.testbed.databases import give_databases

ROOT = Path(__file__).resolve().parents[2]


def alive(pid: int) -> bool:
    """Return whether the process runs. A zombie does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in ("Z", "X")


def wait_until(condition: Callable[[], bool], what: str, limit_s: float = 60) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {limit_s} s: {what}"
        time.sleep(0.02)


def assert_gone(pid: int) -> None:
    """Assert that the process ends: a killed one takes a moment, an orphan stays."""
    wait_until(lambda: not alive(pid), f"process {pid} is gone", limit_s=5)


def pid_in(path: Path) -> int:
    """Wait for the process id that a process writes to the file."""
    # a refresh on a new home creates two databases: 10 s, a minute on a machine with seven times its load
    wait_until(lambda: path.exists() and path.read_text() != "", f"process id in {path}", limit_s=180)
    return int(path.read_text())


def processes_of(home: Path) -> list[int]:
    """Return all processes that run for this home: stages, their guards, the temporary Prefect server."""
    wanted = f"DRAFTSMITH_HOME={home}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0") and alive(int(folder.name)):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def environment(home: Path, **variables: str) -> dict[str, str]:
    """Return this process's environment for a command in a home: without a server of Prefect or MLflow."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "MLFLOW_"))}
    return {**others, "DRAFTSMITH_HOME": str(home), **variables}


def toy_command(home: Path, *arguments: str | Path, **variables: str) -> subprocess.Popen[str]:
    """Start the `draftsmith` command with the toy pipeline, in a new session as from a terminal.

    variables: added to its environment.
    """
    give_databases(home)
    return subprocess.Popen(
        [sys.executable, "-m", "tests.flows.toy_command", *map(str, arguments)],
        cwd=ROOT,
        env=environment(home, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # a background job of a script inherits an ignored SIGINT; a terminal's command does not
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def run_toy(home: Path, *arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    with toy_command(home, *arguments, **variables) as process:
        out, err = process.communicate(timeout=600)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


# The server ends with its process, but counts as permanent here.
_SERVER = """
import os
from pathlib import Path
from draftsmith.flows.orchestration import server as prefect

with prefect.prefect_server(Path(os.environ["DRAFTSMITH_HOME"])) as wait:
    wait(lambda _line: None)
prefect._temporary.clear()
"""


def beside_server(home: Path, program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program with its own Prefect server (`server`). variables: added to its environment."""
    return _python(home, _SERVER + program, ROOT, variables)


def run_python(home: Path, program: str, cwd: Path = ROOT) -> str:
    """Run a Python program and return what it prints."""
    done = _python(home, program, cwd, {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return done.stdout


def _python(home: Path, program: str, cwd: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    give_databases(home)
    command = [sys.executable, "-c", program]
    return subprocess.run(
        command, cwd=cwd, env=environment(home, **variables), capture_output=True, text=True, timeout=600, check=False
    )
