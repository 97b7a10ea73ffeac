"""Which artifact every node of a run was, refresh by refresh: one line a node in `history/NAME.jsonl` of the home."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from draftsmith.artifacts.home import file_name
from draftsmith.artifacts.manifest import ArtifactRef
from draftsmith.artifacts.store import SHORT

_FIELDS = ("at", "node", "stage", "key", "content_id")


def _path(home: Path, run: str) -> Path:
    return home / "history" / f"{file_name(run)}.jsonl"


def note_made(home: Path, run: str, node: str, ref: ArtifactRef) -> None:
    """A node is there: made, or reused. Never an error itself: it explains, it decides nothing."""
    line = {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "node": node,
        "stage": ref.stage,
        "key": ref.key,
        "content_id": ref.content_id,
    }
    with contextlib.suppress(OSError):
        _path(home, run).parent.mkdir(parents=True, exist_ok=True)
        with _path(home, run).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")  # one write: runs that race do not mix their lines


def made_before(home: Path, run: str, node: str) -> list[ArtifactRef]:
    """What the node was in the runs of this name, latest first, each key once. The folders may be gone."""
    found: dict[str, ArtifactRef] = {}
    for entry in reversed(list(_entries(_path(home, run)))):
        stage, key = entry["stage"], entry["key"]
        if entry["node"] == node and key not in found:
            found[key] = ArtifactRef(stage, key, entry["content_id"], home / "store" / stage / key[:SHORT])
    return list(found.values())


def last_used(home: Path) -> dict[tuple[str, str], float]:
    """When runs of any name have last made or reused an artifact (seconds since the epoch), by stage and short key."""
    found: dict[tuple[str, str], float] = {}
    for path in (home / "history").glob("*.jsonl"):
        for entry in _entries(path):
            place = entry["stage"], entry["key"][:SHORT]
            with contextlib.suppress(ValueError):
                found[place] = max(found.get(place, 0.0), datetime.fromisoformat(entry["at"]).timestamp())
    return found


def _entries(path: Path) -> Iterator[dict[str, str]]:
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        with contextlib.suppress(ValueError):  # a line that was not finished
            entry = json.loads(line)
            if isinstance(entry, dict) and all(isinstance(entry.get(name), str) for name in _FIELDS):
                yield entry
