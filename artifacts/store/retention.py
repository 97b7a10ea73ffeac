"""What `draftsmith prune` may remove from a home: leftovers, and unused complete artifacts.

Leftovers are old unfinished attempts and shards, replaced artifacts, copies of drafters from MLflow, and logs. A
complete artifact is unused if no run has used it for a long time, no model line names it, and nothing that stays was
made from it.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from draftsmith.artifacts.atomic import disk_errors
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import UPLOADED
from draftsmith.artifacts.locks import LOCK_LIMIT_S, LockTimeoutError, LockWait, is_locked, lock_holder, locked
from draftsmith.artifacts.store.local import PARTIAL, REPLACED, SHORT
from draftsmith.artifacts.store.manifest import MANIFEST, SHARD, Manifest, read_elsewhere, read_manifest
from draftsmith.artifacts.store.mirror import open_store

ShortRef = tuple[str, str]  # (stage, short key): the folder in the store
_LOCK = ".lock-artifacts"  # file in the home: readers share the lock, prune takes it exclusively
_LOGS = ("*.log", "*.request.json")
REPLACED_ARTIFACT = "replaced artifact"


@dataclass(frozen=True)
class Leftover:
    """A folder or file that may be removed if it was not touched for a long time."""

    kind: str
    path: Path
    bytes: int
    touched: float  # seconds since the epoch: the latest time of its files
    lock: Path | None = None  # held by a run that works on it
    node_folder: Path | None = None  # for a shard: the folder of its node's stage, whose attempts may use it

    def remove(self) -> bool:
        """Delete it, unless a run now uses it; return whether it was deleted."""
        with disk_errors(f"removing {self.path}"):
            if self.node_folder is not None and _attempts(self.node_folder):
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
        """Return its content id if it was an artifact and its manifest is readable, else None."""
        try:
            return read_manifest(self.path).content_id if (self.path / MANIFEST).is_file() else None
        except DraftsmithError:
            return None


def leftovers(home: Path, before: float) -> list[Leftover]:
    """Return a home's leftovers that were last touched before a time (seconds since the epoch), largest first."""
    root = open_store(home).root
    candidates = [_describe("log", path) for pattern in _LOGS for path in (home / "logs").glob(pattern)]
    for folder in root.glob(f"*/{PARTIAL}*"):
        lock = folder.with_name(f".lock-{folder.name.removeprefix(PARTIAL)}")
        complete = (folder / "out" / MANIFEST).exists()  # killed between two renames: the next run finishes it
        if not complete and not is_locked(lock):
            candidates.append(_describe("unfinished attempt", folder, lock))
    for stage in root.glob(f"*{SHARD}"):
        node = stage.with_name(stage.name.removesuffix(SHARD))
        if _attempts(node):  # which may use any of the shards: a shard does not record its node
            continue
        for folder in stage.glob("[!.]*/"):  # of a node that is complete or was abandoned
            candidates.append(_describe("shard", folder, folder.with_name(f".lock-{folder.name}"), node))
    candidates += [_describe("copy of an uploaded drafter", folder) for folder in (home / UPLOADED).glob("*/")]
    candidates += [_describe(REPLACED_ARTIFACT, folder) for folder in root.glob(f"*/{REPLACED}*")]
    return sorted((leftover for leftover in candidates if leftover.touched < before), key=lambda old: -old.bytes)


def _attempts(stage: Path) -> bool:
    """Return whether a stage has an unfinished attempt, running or not."""
    return any(stage.glob(f"{PARTIAL}*"))


def _describe(kind: str, path: Path, lock: Path | None = None, node_folder: Path | None = None) -> Leftover:
    stats = [member.lstat() for member in [path, *path.rglob("*")]]
    return Leftover(kind, path, sum(s.st_size for s in stats), max(s.st_mtime for s in stats), lock, node_folder)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def artifacts_in_use(
    home: Path,
    run: str,
    say: Callable[[str], None] = lambda _line: None,
    *,
    limit_s: float = LOCK_LIMIT_S,
    check: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Keep prune from removing artifacts during the body; waits for a running prune, as `locked` does."""
    with ExitStack() as stack, disk_errors("taking artifacts into use:"):
        wait = LockWait(limit_s, "", lambda holder: say(f"waiting while artifacts are removed ({holder})"), check)
        stack.enter_context(locked(home / _LOCK, run, wait, shared=True))
        held = stack.pop_all()
    with held:  # outside of `disk_errors`: errors of the body are the run's own
        yield


@contextmanager
def exclusive_for_prune(home: Path) -> Iterator[None]:
    """Hold the exclusive lock of prune. Raises DraftsmithError while a run that may read artifacts is alive."""
    with ExitStack() as stack:
        run_locks = [*(home / "refreshes").glob(".lock-*"), *(home / "store").glob("*/.lock-*")]
        try:
            with disk_errors("removing artifacts:"):
                stack.enter_context(locked(home / _LOCK, "prune --artifacts", LockWait(0)))
            held = next((path for path in run_locks if is_locked(path)), None)
        except LockTimeoutError:
            held = home / _LOCK
        if held is not None:
            who = f": {holder}" if (holder := lock_holder(held)) is not None else ""
            raise DraftsmithError(
                f"a run of {home} is alive (it holds {held}{who}) and may still read artifacts. Prune them when it has "
                "ended."
            )
        yield


@dataclass(frozen=True)
class UnusedArtifact(Leftover):
    """A complete artifact; `touched` is when a run last made or used it."""

    def remove(self) -> bool:
        """Delete it, unless a run holds it. A kill midway leaves a replaced artifact, not a damaged one."""
        assert self.lock is not None
        with disk_errors(f"removing {self.path}"):
            if is_locked(self.lock):
                return False
            with locked(self.lock):
                renamed = self.path.with_name(f"{REPLACED}{self.path.name}-{time.time_ns()}")
                self.path.rename(renamed)
                (renamed / MANIFEST).unlink()  # first, so that no version of a line can be found in it
                shutil.rmtree(renamed)
        return True


def unused_artifacts(root: Path, before: float, needed: Collection[str]) -> list[UnusedArtifact]:
    """Return the artifacts in a store that were last used before a time and that nothing needs, largest first.

    An artifact that stays keeps everything it was made from, including files in the store that its config names by
    path. A folder whose manifest cannot be read stays too.

    root: resolved folder of the store. before: seconds since the epoch; a run touches the manifest of what it reuses.
    needed: content ids of artifacts that stay whatever their age.
    """
    artifacts = dict(_artifacts(root))
    last_use = {
        ref: max(datetime.fromisoformat(m.created_at).timestamp(), root.joinpath(*ref, MANIFEST).stat().st_mtime)
        for ref, m in artifacts.items()
    }
    stays = {ref for ref, m in artifacts.items() if last_use[ref] >= before or m.content_id in needed}
    to_follow = [(root.joinpath(*ref), artifacts[ref]) for ref in stays]
    to_follow += [(folder, manifest) for folder, manifest in _replaced(root) if manifest.content_id in needed]
    while to_follow:
        new = {ref for ref in _sources(root, *to_follow.pop()) if ref in artifacts} - stays
        stays |= new
        to_follow += [(root.joinpath(*ref), artifacts[ref]) for ref in new]
    unused = [_unused(root, ref, artifacts[ref], last_use[ref]) for ref in artifacts.keys() - stays]
    return sorted(unused, key=lambda artifact: -artifact.bytes)


def _artifacts(root: Path) -> Iterator[tuple[ShortRef, Manifest]]:
    for folder in root.glob("[!.]*/[!.]*/"):
        if not folder.parent.name.endswith(SHARD):  # listed by `leftovers`
            with suppress(DraftsmithError):
                yield (folder.parent.name, folder.name), read_manifest(folder)


def _replaced(root: Path) -> Iterator[tuple[Path, Manifest]]:
    """Yield replaced artifacts, which may be versions of a line."""
    for folder in root.glob(f"[!.]*/{REPLACED}*/"):
        with suppress(DraftsmithError):
            yield folder, read_manifest(folder)


def _sources(root: Path, folder: Path, manifest: Manifest) -> Iterator[ShortRef]:
    for entry in manifest.inputs.values():
        yield entry.stage, entry.key[:SHORT]
    for path in (*manifest.external, *read_elsewhere(folder)):
        with suppress(ValueError):  # outside the store
            stage, key, *_ = Path(path).resolve().relative_to(root).parts
            yield stage, key


def _unused(root: Path, ref: ShortRef, manifest: Manifest, last: float) -> UnusedArtifact:
    folder = root.joinpath(*ref)
    here = [path for name in manifest.files if (path := folder / name).is_file()]  # others are only in the bucket
    size = sum(path.stat().st_size for path in here)
    return UnusedArtifact("artifact", folder, size, last, folder.with_name(f".lock-{folder.name}"))
