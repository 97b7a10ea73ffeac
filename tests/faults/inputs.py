"""Files outside the store that somebody changes while a stage reads them."""

from __future__ import annotations

from pathlib import Path

from tests.faults.home import Ended
from tests.faults.scene import STARTING, WORKING, Scene, Strike

_READ_BY = {"prompts": "prompts.jsonl", "logs": "answers.jsonl"}


def replaced(scene: Scene) -> Ended:
    """Replace an input file by one of other rows; the old one comes back for the next attempt."""
    path = scene.home.folder / _READ_BY[scene.node]
    content = path.read_bytes()
    running = scene.start()
    try:
        scene.reach(running, (STARTING, WORKING))
        _replace(path, b"".join(content.splitlines(keepends=True)[:-1]))
        return scene.check_end(running.wait(), [2], "changed while it was read")
    finally:
        _replace(path, content)


def _replace(path: Path, content: bytes) -> None:
    other = path.with_suffix(".other")
    other.write_bytes(content)
    other.replace(path)


FAULTS: dict[str, Strike] = {"input file replaced": replaced}
NODES = {"input file replaced": tuple(_READ_BY)}
