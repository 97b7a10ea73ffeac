"""What a home need not keep: leftovers that nobody goes on with, and complete artifacts that nothing needs any more.

Leftovers are old unfinished attempts and shards, replaced artifacts, copies of drafters that MLflow has, and logs. A
complete artifact is unused when no run has used it for long, no drafter line names it, and nothing that stays was made
from it.
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

ArtifactPlace = tuple[str, str]  # stage and short key: the folder in the store
_LOCK = ".lock-artifacts"  # of the home: whoever reads shares it, whoever removes has it alone
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
    node_folder: Path | None = None  # of a shard: the stage's folder, where it is taken up by an attempt at a node

    def remove(self) -> bool:
        """Delete it, unless a run has taken it up since."""
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
        """Return the beginning of the content id of what it once was; None if it was no artifact, or nobody can say."""
        try:
            return read_manifest(self.path).content_id if (self.path / MANIFEST).is_file() else None
        except DraftsmithError:
            return None


def leftovers(home: Path, before: float) -> list[Leftover]:
    """Return a home's leftovers that were last touched before a moment (seconds since the epoch), largest first."""
    root = open_store(home).root
    found = list(_logs(home / "logs"))
    for folder in root.glob(f"*/{PARTIAL}*"):
        lock = folder.with_name(f".lock-{folder.name.removeprefix(PARTIAL)}")
        complete = (folder / "out" / MANIFEST).exists()  # killed between two renames: the next run ends it
        if not complete and not is_locked(lock):
            found.append(_describe("unfinished attempt", folder, lock))
    for stage in root.glob(f"*{SHARD}"):
        node = stage.with_name(stage.name.removesuffix(SHARD))
        if _attempts(node):  # which may go on with any of them; a shard does not say of which node it is
            continue
        for folder in stage.glob("[!.]*/"):  # of a node that is made, or that was given up
            found.append(_describe("shard", folder, folder.with_name(f".lock-{folder.name}"), node))
    found += [_describe("copy of an uploaded drafter", folder) for folder in (home / UPLOADED).glob("*/")]
    found += [_describe(REPLACED_ARTIFACT, folder) for folder in root.glob(f"*/{REPLACED}*")]
    return sorted((each for each in found if each.touched < before), key=lambda each: -each.bytes)


def _logs(folder: Path) -> Iterator[Leftover]:
    for pattern in _LOGS:
        for path in folder.glob(pattern):
            yield _describe("log", path)


def _attempts(stage: Path) -> bool:
    """Return whether a node of a stage is being made, or was begun and is not finished."""
    return any(stage.glob(f"{PARTIAL}*"))


def _describe(what: str, path: Path, lock: Path | None = None, node_folder: Path | None = None) -> Leftover:
    stats = [each.lstat() for each in [path, *path.rglob("*")]]
    return Leftover(what, path, sum(s.st_size for s in stats), max(s.st_mtime for s in stats), lock, node_folder)


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
    """Keep what this run finds in the store until it ends. Waits for who removes artifacts, as `locked` does."""
    with ExitStack() as stack, disk_errors("taking artifacts into use:"):
        wait = LockWait(limit_s, "", lambda holder: say(f"waiting while artifacts are removed ({holder})"), check)
        stack.enter_context(locked(home / _LOCK, run, wait, shared=True))
        held = stack.pop_all()
    with held:  # the disk's errors from here on are the run's own
        yield


@contextmanager
def exclusive_for_prune(home: Path) -> Iterator[None]:
    """For who removes artifacts. Raises DraftsmithError while a run is alive: it looks for what is there when it
    begins, and reads it hours later."""
    with ExitStack() as stack:
        of_runs = [*(home / "refreshes").glob(".lock-*"), *(home / "store").glob("*/.lock-*")]
        try:
            with disk_errors("removing artifacts:"):
                stack.enter_context(locked(home / _LOCK, "prune --artifacts", LockWait(0)))
            held = next((path for path in of_runs if is_locked(path)), None)
        except LockTimeoutError:
            held = home / _LOCK
        if held is not None:
            who = f": {holder}" if (holder := lock_holder(held)) is not None else ""
            raise DraftsmithError(
                f"a run of {home} is alive (it holds {held}{who}): what it is going to read must stay; prune artifacts "
                "when it has ended"
            )
        yield


@dataclass(frozen=True)
class UnusedArtifact(Leftover):
    """A complete artifact; `touched` is when a run has last made or used it."""

    def remove(self) -> bool:
        """Delete it, unless a run holds it. Killed on the way, it is one that was replaced, and no damaged one."""
        assert self.lock is not None
        with disk_errors(f"removing {self.path}"):
            if is_locked(self.lock):
                return False
            with locked(self.lock):
                aside = self.path.with_name(f"{REPLACED}{self.path.name}-{time.time_ns()}")
                self.path.rename(aside)
                (aside / MANIFEST).unlink()  # first: then it is nothing that a version of a line may be
                shutil.rmtree(aside)
        return True


def unused_artifacts(root: Path, before: float, needed: Collection[str]) -> list[UnusedArtifact]:
    """Artifacts in the (resolved) folder of a store that were last used before a moment, largest first.

    before: seconds since the epoch; a run touches the manifest of what it reuses. needed: content ids of artifacts that
    stay whatever their age. What stays keeps all that it was made from, and files in the store that
    it was given as a path. A folder whose manifest cannot be read stays too.
    """
    there = dict(_artifacts(root))
    last = {
        place: max(_created(each), root.joinpath(*place, MANIFEST).stat().st_mtime) for place, each in there.items()
    }
    stays = {place for place, each in there.items() if last[place] >= before or each.content_id in needed}
    to_follow = [(root.joinpath(*place), there[place]) for place in stays]
    to_follow += [(folder, each) for folder, each in _replaced(root) if each.content_id in needed]
    while to_follow:
        new = {each for each in _sources(root, *to_follow.pop()) if each in there} - stays
        stays |= new
        to_follow += [(root.joinpath(*place), there[place]) for place in new]
    found = [_unused(root, place, there[place], last[place]) for place in there.keys() - stays]
    return sorted(found, key=lambda each: -each.bytes)


def _artifacts(root: Path) -> Iterator[tuple[ArtifactPlace, Manifest]]:
    for folder in root.glob("[!.]*/[!.]*/"):
        if not folder.parent.name.endswith(SHARD):  # which `leftovers` lists
            with suppress(DraftsmithError):
                yield (folder.parent.name, folder.name), read_manifest(folder)


def _replaced(root: Path) -> Iterator[tuple[Path, Manifest]]:
    """Yield replaced artifacts: a drafter of a line may be one, and stays."""
    for folder in root.glob(f"[!.]*/{REPLACED}*/"):
        with suppress(DraftsmithError):
            yield folder, read_manifest(folder)


def _sources(root: Path, folder: Path, manifest: Manifest) -> Iterator[ArtifactPlace]:
    for entry in manifest.inputs.values():
        yield entry.stage, entry.key[:SHORT]
    for path in (*manifest.external, *read_elsewhere(folder)):
        with suppress(ValueError):  # outside the store
            stage, key, *_ = Path(path).resolve().relative_to(root).parts
            yield stage, key


def _created(manifest: Manifest) -> float:
    return datetime.fromisoformat(manifest.created_at).timestamp()


def _unused(root: Path, place: ArtifactPlace, manifest: Manifest, last: float) -> UnusedArtifact:
    folder = root.joinpath(*place)
    size = sum(path.stat().st_size for name in manifest.files if (path := folder / name).is_file())  # not fetched: none
    return UnusedArtifact("artifact", folder, size, last, folder.with_name(f".lock-{folder.name}"))
