"""Which artifact every node of a run was, refresh by refresh: one line a node in `history/NAME.jsonl` of the home."""

from __future__ import annotations

import contextlib
import json
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from draftsmith.artifacts.manifest import ArtifactRef


def _path(home: Path, run: str) -> Path:
    return home / "history" / f"{quote(run, safe='')}.jsonl"


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
    try:
        lines = _path(home, run).read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found: dict[str, ArtifactRef] = {}
    for line in reversed(lines):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that was not finished
            entry = json.loads(line)
            if entry["node"] == node and entry["key"] not in found:
                stage, key = entry["stage"], entry["key"]
                found[key] = ArtifactRef(stage, key, entry["content_id"], home / "store" / stage / key[:16])
    return list(found.values())
