"""How long it takes until something happens: the help, the import, an unchanged refresh, and every stage's process.

A refresh of the test bed's target is made in a new home. An unchanged one is the same command again. A stage's
process is started as that refresh started it, in other folders, and its clock stops at the first piece of work that it
reports: Python, libraries, weights of a megabyte, and that piece itself. Stages that report none are measured to their
end.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from tests.benchmarks import harness
from tests.faults import configs

GOALS = {"help": 0.3, "import draftsmith": 0.5, "unchanged refresh": 10.0, "stage": 4.0}  # seconds


def timed(arguments: list[str], home: Path) -> float:
    """Return the seconds that the command takes in this home, with new servers. Raises DraftsmithError if it fails."""
    ours = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MLFLOW_", "DRAFTSMITH_"))}
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "draftsmith.flows", *arguments],
        env={**ours, "DRAFTSMITH_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise DraftsmithError(f"draftsmith {' '.join(arguments)}: {done.stderr or done.stdout}")
    return time.perf_counter() - began


def imported(home: Path) -> float:
    """Return the seconds until a new Python has imported the package, the start of Python included."""
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import draftsmith"], cwd=home, check=True)
    return time.perf_counter() - began


def first_work(request: dict[str, Any], folder: Path) -> float:
    """Return the seconds from the start of a stage's process to its first progress, or to its end."""
    request = {**request, "out": str(folder / "out"), "work": str(folder / "work")}
    path = folder / "request.json"
    path.write_text(json.dumps(request), "utf-8")
    began, worked = time.perf_counter(), 0.0
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "draftsmith.stages", str(path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(place for place in sys.path if place)},
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if not worked and json.loads(line)["event"] == "progress":
                worked = time.perf_counter() - began
    if process.returncode:
        raise DraftsmithError(f"stage {request['stage']}: ended with code {process.returncode} (request: {request})")
    return worked or time.perf_counter() - began


def requests_of(home: Path) -> dict[str, dict[str, Any]]:
    """Return the request to the process of each stage, the last one of stages that ran twice."""
    found = sorted((home / "logs").rglob("*.request.json"), key=lambda path: path.stat().st_mtime)
    read = [json.loads(path.read_text("utf-8")) for path in found]
    return {request["stage"]: request for request in read}


def measure(repetitions: int, folder: Path) -> list[dict[str, Any]]:
    """Measure everything; return a row each. folder: for the home."""
    home, config = folder / "home", str(configs.write(configs.PLAIN, folder))
    whole = timed(["run", config], home)
    seconds: dict[str, list[float]] = {
        "help": [timed(["--help"], home) for _ in range(repetitions + 1)][1:],
        "import draftsmith": [imported(home) for _ in range(repetitions + 1)][1:],
        "unchanged refresh": [timed(["run", config], home) for _ in range(repetitions + 1)][1:],
    }
    for stage, request in requests_of(home).items():
        seconds[f"stage {stage}"] = []
        for _ in range(repetitions):
            with tempfile.TemporaryDirectory(prefix="startup-") as work:
                seconds[f"stage {stage}"].append(first_work(request, Path(work)))
    rows = []
    for name, measured in seconds.items():
        median, goal = harness.median(measured), GOALS[name if name in GOALS else "stage"]
        rows.append({"what": name, "seconds": median, "goal_s": goal, "goal_times": goal / median})
    print(f"the refresh that was made first took {whole:.0f} s")
    return rows


def main() -> None:
    options = harness.parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        rows = measure(options.repetitions, Path(folder))
    harness.print_rows("Until something happens", rows)
    harness.report("startup", {"rows": rows}, options)


if __name__ == "__main__":
    harness.run(main)
