"""The note of an attempt at an artifact: who builds it, where, since when, its progress, and why it failed.

The note is a file in the attempt's folder, and is deleted with it when the artifact is complete. A killed process
leaves its note in place, so only the lock of the key shows whether the attempt is running.
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
from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.artifacts.locks import user_name
from draftsmith.artifacts.redaction import redacted
from draftsmith.artifacts.store.manifest import local_time
from draftsmith.artifacts.text import format_duration
from draftsmith.flows.execution.display import ProgressRate

NOTE = "attempt.json"
_EVERY_S = 2.0  # between two writes of the progress


@dataclass(frozen=True)
class Attempt:
    """An attempt at an artifact, as its note records it. Moments are seconds since the epoch."""

    run: str
    node: str
    host: str
    pid: int  # of the command or the flow run, not of the stage's own process
    user: str
    since: float
    at: float  # of the progress, or of the error
    done: int = 0
    total: int = 0
    unit: str = ""
    left_s: float | None = None
    waits: str = ""  # what it waits for, before it begins
    error: str = ""  # why it failed, one line

    @property
    def failed_at(self) -> str:
        """When it failed, in local time."""
        return _local(self.at)

    def __str__(self) -> str:
        now = time.time()
        text = f"node {self.node} of {self.run} on {self.host} (pid {self.pid}, user {self.user}) since "
        text += f"{_local(self.since)} ({format_duration(now - self.since)})"
        if self.waits:
            text += f", {self.waits}"
        if self.total:
            text += f", {self.done}/{self.total} {self.unit}, reported {format_duration(max(0.0, now - self.at))} ago"
        return text + (f", {format_duration(self.left_s)} left then" if self.left_s is not None else "")


class AttemptNote:
    """Writes the note of one attempt. It never raises: a full disk may be what ended the attempt."""

    def __init__(self, folder: Path, run: str, node: str) -> None:
        """folder: the attempt's, as `Store.partial_path` returns it."""
        self._path, self._rate, self._written = folder / NOTE, ProgressRate(), 0.0
        now = time.time()
        self._note = Attempt(run, node, platform.node(), os.getpid(), user_name(), since=now, at=now)
        self._write()

    def progress(self, done: int, total: int, unit: str) -> None:
        """Write the progress, at most every two seconds."""
        _, left = self._rate.update(done, total, unit, time.monotonic())
        self._note = replace(self._note, at=time.time(), done=done, total=total, unit=unit, left_s=left)
        if time.monotonic() - self._written > _EVERY_S:
            self._write()

    def waiting(self, reason: str) -> None:
        """Write what the attempt waits for; an empty text: it has begun."""
        self._note = replace(self._note, waits=reason)
        self._write()

    def failed(self, error: BaseException) -> None:
        """Write why the attempt failed."""
        self._note = replace(self._note, at=time.time(), error=redacted(one_line(error)))
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        with contextlib.suppress(DraftsmithError):
            write_text(self._path, json.dumps(asdict(self._note)))


def read_attempt(folder: Path) -> Attempt | None:
    """Return the note in the folder of an attempt, or None if there is no readable one."""
    try:
        return Attempt(**json.loads((folder / NOTE).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _local(moment: float) -> str:
    return local_time(datetime.fromtimestamp(moment, UTC))
