"""Notes of the last error of a node, kept beside the logs until the node succeeds: what `draftsmith status` shows."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from draftsmith.artifacts.manifest import local_time
from draftsmith.artifacts.redaction import redacted


@dataclass(frozen=True)
class Failure:
    error: str  # one line
    at: str  # as `artifacts.manifest.local_time`


def _path(logs: Path, stage: str, key: str) -> Path:
    return logs / f"{stage}-{key[:16]}.failed.json"


def note_failure(logs: Path, stage: str, key: str, error: BaseException) -> None:
    """Never an error itself: the disk may be what failed."""
    failure = Failure(redacted(str(error)) or type(error).__name__, local_time(datetime.now(UTC)))
    with contextlib.suppress(OSError):
        _path(logs, stage, key).write_text(json.dumps(asdict(failure)), "utf-8")


def forget_failure(logs: Path, stage: str, key: str) -> None:
    with contextlib.suppress(OSError):
        _path(logs, stage, key).unlink(missing_ok=True)


def last_failure(logs: Path, stage: str, key: str) -> Failure | None:
    try:
        return Failure(**json.loads(_path(logs, stage, key).read_text("utf-8")))
    except (OSError, ValueError, TypeError):
        return None
