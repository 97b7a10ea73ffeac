"""Notes of who makes an artifact and how far it is, kept beside the logs while it is made: for `draftsmith status`.

The lock of the key says whether somebody does; the note of a process that was killed stays, and means nothing then.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.locks import user_name
from draftsmith.artifacts.manifest import local_time
from draftsmith.artifacts.text import duration
from draftsmith.flows.pipeline.display import Rate

_EVERY_S = 2.0  # the note is written again


@dataclass(frozen=True)
class Running:
    """An attempt at an artifact. Moments are seconds since the epoch."""

    run: str
    node: str
    host: str
    pid: int  # of the command or the flow run, not of the stage's own process
    user: str
    since: float
    at: float  # of the progress below
    done: int = 0
    total: int = 0
    unit: str = ""
    left_s: float | None = None
    waits: str = ""  # for what, before it begins

    def __str__(self) -> str:
        now = time.time()
        text = f"node {self.node} of {self.run} on {self.host} (pid {self.pid}, user {self.user}) since "
        text += f"{local_time(datetime.fromtimestamp(self.since, UTC))} ({duration(now - self.since)})"
        if self.waits:
            text += f", {self.waits}"
        if self.total:
            text += f", {self.done}/{self.total} {self.unit}, said {duration(max(0.0, now - self.at))} ago"
        return text + (f", {duration(self.left_s)} left then" if self.left_s is not None else "")


class RunningNote:
    """The note of one attempt, removed when it ends. Never an error itself."""

    def __init__(self, logs: Path, stage: str, key: str, run: str, node: str) -> None:
        self._path, self._rate, self._written = _path(logs, stage, key), Rate(), 0.0
        now = time.time()
        self._note = Running(run, node, platform.node(), os.getpid(), user_name(), since=now, at=now)
        self._write()

    def progress(self, done: int, total: int, unit: str) -> None:
        _, left = self._rate.update(done, total, unit, time.monotonic())
        self._note = replace(self._note, at=time.time(), done=done, total=total, unit=unit, left_s=left)
        if time.monotonic() - self._written > _EVERY_S:
            self._write()

    def waiting(self, what: str) -> None:
        self._note = replace(self._note, waits=what)
        self._write()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)

    def _write(self) -> None:
        self._written = time.monotonic()
        with contextlib.suppress(DraftsmithError):  # what the disk refuses
            write_text(self._path, json.dumps(asdict(self._note)))


def who_runs(logs: Path, stage: str, key: str) -> Running | None:
    """Of an artifact whose lock is held."""
    try:
        return Running(**json.loads(_path(logs, stage, key).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _path(logs: Path, stage: str, key: str) -> Path:
    return logs / f"{stage}-{key[:16]}.running.json"
