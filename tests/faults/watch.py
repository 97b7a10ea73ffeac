"""Finds the stage process of a running command, and waits for points in its life."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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


@dataclass(frozen=True)
class Watch:
    """Looks for the stages of a command."""

    home: Home
    running: Running

    def stage(self) -> StageProcess | None:
        """Wait for the next stage that runs; None if the command has ended before."""
        running: list[StageProcess] = []

        def look() -> bool:
            running.extend(self._stages())
            return bool(running) or self.running.process.poll() is not None

        until(look)
        return running[0] if running else None

    def _stages(self) -> list[StageProcess]:
        return [
            StageProcess(self.home, pid, artifact, _files(self.home.partial_of(artifact)))
            for pid in children(self.running.process.pid)
            if (artifact := _artifact_of(pid)) is not None
        ]


def children(parent: int) -> list[int]:
    """Return the living direct children of a process."""
    try:
        listed = [each.read_text().split() for each in Path(f"/proc/{parent}/task").glob("*/children")]
    except OSError:  # a thread of it has just ended
        listed = []
    if listed:
        return [int(pid) for pids in listed for pid in pids if alive(int(pid))]
    living = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            status = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if int(status[1]) == parent and status[0] not in ("Z", "X"):
            living.append(int(folder.name))
    return living


def _artifact_of(pid: int) -> str | None:
    """Return the artifact that a stage process makes, from the name of its request; None for any other process."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
    except OSError:
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
