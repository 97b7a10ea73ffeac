"""An attempt at an artifact: the right to make it, its folders, and a note of who makes it and how far it is.

The note is a file in the attempt's folder, and is deleted with it when the artifact is complete. A killed process
leaves its note there, so only the lock of the key shows whether the attempt is running.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from draftsmith.artifacts.atomic import disk_errors, fsync, remove_temporary, write_text
from draftsmith.artifacts.errors import DraftsmithError, one_line
from draftsmith.artifacts.locks import Lock, user_name
from draftsmith.artifacts.store.manifest import (
    PENDING,
    Artifact,
    PendingManifest,
    artifact_files,
    file_sizes,
    overwrite_in_place,
    package_versions,
)

NOTE = "attempt.json"
_EVERY_S = 2.0  # shortest time between two writes of the progress


@dataclass(frozen=True)
class AttemptNote:
    """Who makes an artifact, and how far it is. Times are in seconds since the epoch."""

    run: str
    node: str
    host: str
    pid: int  # of the command or the flow run, not of the stage's own process
    user: str
    since: float
    at: float  # time of the progress, or of the error
    done: int = 0
    total: int = 0
    unit: str = ""
    left_s: float | None = None
    waits: str = ""  # what it waits for, before it begins
    error: str = ""  # why it failed, one line

    @classmethod
    def read(cls, partial: Path) -> AttemptNote | None:
        """Return the note in the folder of an attempt, or None if there is no readable one."""
        try:
            return cls(**json.loads((partial / NOTE).read_text("utf-8")))
        except (OSError, ValueError, TypeError):
            return None


class Attempt:
    """The exclusive right to make one artifact, as long as its lock lasts. Its folders persist between attempts.

    Writing the note never raises: a full disk may be what ends the attempt.
    """

    def __init__(
        self,
        partial: Path,
        stage: str,
        key: str,
        lock: Lock,
        complete: Callable[[PendingManifest, Lock], Artifact],
        *,
        run: str,
        node: str,
        forced: str = "",
    ) -> None:
        """Begin an attempt in folder `partial`.

        complete: the store's method that commits. run, node: for the note. forced: id of a forced attempt, kept when it
        is continued, so that its shards are made again only once.
        """
        self.stage, self.key, self.lock, self.forced = stage, key, lock, forced
        self.out = partial / "out"  # becomes the artifact
        self.work = partial / "work"  # shards and checkpoints of the attempt; deleted when the artifact is complete
        self._partial, self._complete, self._written = partial, complete, 0.0
        now = time.time()
        self._note = AttemptNote(run, node, platform.node(), os.getpid(), user_name(), since=now, at=now)
        self._write()

    def progress(self, done: int, total: int, unit: str, left_s: float | None) -> None:
        """Note the progress, at most every two seconds."""
        self._note = replace(self._note, at=time.time(), done=done, total=total, unit=unit, left_s=left_s)
        if time.monotonic() - self._written > _EVERY_S:
            self._write()

    def waiting(self, reason: str) -> None:
        """Note what the attempt waits for; an empty text means that it has begun."""
        self._note = replace(self._note, waits=reason)
        self._write()

    def failed(self, error: BaseException) -> None:
        """Note why the attempt failed."""
        self._note = replace(self._note, at=time.time(), error=one_line(error))
        self._write()

    def _write(self) -> None:
        self._written = time.monotonic()
        with contextlib.suppress(DraftsmithError):
            write_text(self._partial / NOTE, json.dumps(asdict(self._note)))

    def commit(self, made_from: PendingManifest) -> Artifact:
        """Turn `out` into the artifact: flush its files, write its manifest last, then rename it.

        made_from: the pending manifest, with metrics and duration. If this fails midway (a full disk), the next claim
        of this key finishes the commit. Raises LockLostError if the lock was taken over meanwhile.
        """
        self.lock.check()
        with disk_errors(f"completing {self.stage}"):
            remove_temporary(self.out)
            names = artifact_files(self.out)
            if not names:
                raise DraftsmithError(
                    f"stage {self.stage} wrote nothing to {self.out}. Check that it writes its output there."
                )
            for name in names:
                fsync(self.out / name)
            for folder in (self.out, *(path for path in self.out.rglob("*") if path.is_dir())):
                fsync(folder)
            pending = made_from.model_copy(
                update={
                    "sizes": file_sizes(self.out),
                    "created_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
                    # NaN and infinity have no JSON form and would make the manifest unreadable
                    "metrics": {name: value for name, value in made_from.metrics.items() if math.isfinite(value)},
                    "duration_s": round(made_from.duration_s, 3),
                    "versions": package_versions(self.out),
                }
            )
            overwrite_in_place(self._partial / PENDING, pending.model_dump_json().encode())
            return self._complete(pending, self.lock)

    def discard(self) -> None:
        """Delete what the attempt has made so far, because its inputs changed."""
        for folder in (self.out, self.work):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
