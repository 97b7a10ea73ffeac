"""Finds the stage process of a running command, and waits for points in its life."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.faults.home import LIMIT_S, Home, Running
from tests.flows.processes import alive

_POLL_S = 0.02


def until(condition: Callable[[], bool], limit_s: float = LIMIT_S) -> None:
    """Wait for a condition. Raise TimeoutError after `limit_s`."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened within {limit_s:.0f} s")
        time.sleep(_POLL_S)


@dataclass(frozen=True)
class StageProcess:
    """A running stage."""

    home: Home
    pid: int
    artifact: str  # STAGE/KEY that it makes, the key's first digits
    before: frozenset[tuple[str, int]]  # files of an earlier attempt

    @property
    def alive(self) -> bool:
        return alive(self.pid)

    def wait_until_working(self) -> None:
        """Wait until it has written a file or has ended."""
        until(lambda: not self.alive or bool(_files(self.home.partial_of(self.artifact)) - self.before))

    def wait_until_ended(self) -> None:
        until(lambda: not self.alive)


def next_stage(home: Home, running: Running) -> StageProcess | None:
    """Wait for the next stage that the command runs; None if the command has ended before."""
    stages: list[StageProcess] = []

    def look() -> bool:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(running.process.pid).children():
                if (artifact := _artifact_of(child)) is not None:
                    stages.append(StageProcess(home, child.pid, artifact, _files(home.partial_of(artifact))))
        return bool(stages) or running.process.poll() is not None

    until(look)
    return stages[0] if stages else None


def _artifact_of(process: psutil.Process) -> str | None:
    """Return the artifact that a stage process makes, from the name of its request; None for any other process."""
    try:
        words = process.cmdline()
    except psutil.Error:  # it has just ended
        return None
    if "draftsmith.stages" not in words:
        return None
    name = Path(words[words.index("draftsmith.stages") + 1]).name  # STAGE-KEY-DAY-TIME.request.json
    stage, key, _ = name.split("-", 2)
    return f"{stage}/{key}"


def _files(folder: Path) -> frozenset[tuple[str, int]]:
    """Return names and times of change of the files in a folder."""
    files = set()
    for path in folder.rglob("*"):
        try:
            if path.is_file():
                files.add((str(path), path.stat().st_mtime_ns))
        except OSError:  # a temporary file that has its final name now
            continue
    return frozenset(files)
