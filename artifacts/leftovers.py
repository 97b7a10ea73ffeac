"""What nobody goes on with: old unfinished attempts and shards, replaced artifacts, copies of drafters that MLflow has,
logs. No complete artifact is."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from draftsmith.artifacts.atomic import disk_errors
from draftsmith.artifacts.damage import SHARD
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import UPLOADED
from draftsmith.artifacts.locks import is_locked, locked
from draftsmith.artifacts.manifest import MANIFEST, read_manifest
from draftsmith.artifacts.open_store import store_of
from draftsmith.artifacts.store import PARTIAL, REPLACED

_LOGS = ("*.log", "*.request.json")
REPLACED_ARTIFACT = "replaced artifact"


@dataclass(frozen=True)
class Leftover:
    """A folder or a file, not touched for a while."""

    what: str
    path: Path
    bytes: int
    touched: float  # seconds since the epoch: the latest of its files
    lock: Path | None = None  # who works on it holds this
    joined_in: Path | None = None  # of a shard: the stage's folder, where it is taken up by an attempt at a node

    def remove(self) -> bool:
        """Delete it, unless a run has taken it up since."""
        with disk_errors(f"removing {self.path}"):
            if self.joined_in is not None and _attempts(self.joined_in):
                return False
            if self.lock is None:
                _delete(self.path)
                return True
            if is_locked(self.lock):
                return False
            with locked(self.lock):
                _delete(self.path)
        return True

    @property
    def content(self) -> str | None:
        """The beginning of the content id of what it once was; None if it was no artifact, or nobody can say."""
        try:
            return read_manifest(self.path).content_id if (self.path / MANIFEST).is_file() else None
        except DraftsmithError:
            return None


def leftovers(home: Path, before: float) -> list[Leftover]:
    """Everything under a home that was last touched before a moment (seconds since the epoch), largest first."""
    root = store_of(home).root
    found = list(_logs(home / "logs"))
    for folder in root.glob(f"*/{PARTIAL}*"):
        lock = folder.with_name(f".lock-{folder.name.removeprefix(PARTIAL)}")
        complete = (folder / "out" / MANIFEST).exists()  # killed between two renames: the next run ends it
        if not complete and not is_locked(lock):
            found.append(_described("unfinished attempt", folder, lock))
    for stage in root.glob(f"*{SHARD}"):
        node = stage.with_name(stage.name.removesuffix(SHARD))
        if _attempts(node):  # which may go on with any of them; a shard does not say of which node it is
            continue
        for folder in stage.glob("[!.]*/"):  # of a node that is made, or that was given up
            found.append(_described("shard", folder, folder.with_name(f".lock-{folder.name}"), node))
    found += [_described("copy of an uploaded drafter", folder) for folder in (home / UPLOADED).glob("*/")]
    found += [_described(REPLACED_ARTIFACT, folder) for folder in root.glob(f"*/{REPLACED}*")]
    return sorted((each for each in found if each.touched < before), key=lambda each: -each.bytes)


def _logs(folder: Path) -> Iterator[Leftover]:
    for pattern in _LOGS:
        for path in folder.glob(pattern):
            yield _described("log", path)


def _attempts(stage: Path) -> bool:
    """Whether a node of a stage is being made, or was begun and is not finished."""
    return any(stage.glob(f"{PARTIAL}*"))


def _described(what: str, path: Path, lock: Path | None = None, joined_in: Path | None = None) -> Leftover:
    stats = [each.lstat() for each in [path, *path.rglob("*")]]
    return Leftover(what, path, sum(s.st_size for s in stats), max(s.st_mtime for s in stats), lock, joined_in)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
