"""Complete artifacts that nothing needs any more: no run has used them for long, no drafter line names them, and
nothing that stays was made from them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from draftsmith.artifacts.atomic import disk_errors
from draftsmith.artifacts.damage import SHARD
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.leftovers import Leftover
from draftsmith.artifacts.locks import OTHERS_LIMIT_S, LockTimeoutError, holder_of, is_locked, locked
from draftsmith.artifacts.manifest import MANIFEST, Manifest, elsewhere, read_manifest
from draftsmith.artifacts.store import REPLACED, SHORT

Place = tuple[str, str]  # stage and short key: the folder in the store
_LOCK = ".lock-artifacts"  # of the home: whoever reads shares it, whoever removes has it alone


@contextmanager
def in_use(
    home: Path,
    run: str,
    say: Callable[[str], None] = lambda _line: None,
    *,
    limit_s: float = OTHERS_LIMIT_S,
    check: Callable[[], None] = lambda: None,
) -> Iterator[None]:
    """Until it ends, what this run finds in the store stays. Waits for who removes artifacts, as `locked` does."""
    with ExitStack() as stack, disk_errors("taking artifacts into use:"):
        waiting = locked(
            home / _LOCK,
            lambda holder: say(f"artifacts are being removed, waiting for that ({holder})"),
            run=run,
            limit_s=limit_s,
            shared=True,
            check=check,
        )
        stack.enter_context(waiting)
        held = stack.pop_all()
    with held:  # the disk's errors from here on are the run's own
        yield


@contextmanager
def nobody_reads(home: Path) -> Iterator[None]:
    """For who removes artifacts. Raises DraftsmithError while a run is alive: it looks for what is there when it
    begins, and reads it hours later."""
    with ExitStack() as stack:
        of_runs = [*(home / "refreshes").glob(".lock-*"), *(home / "store").glob("*/.lock-*")]
        try:
            with disk_errors("removing artifacts:"):
                stack.enter_context(locked(home / _LOCK, run="prune --artifacts", limit_s=0))
            held = next((path for path in of_runs if is_locked(path)), None)
        except LockTimeoutError:
            held = home / _LOCK
        if held is not None:
            who = f": {holder}" if (holder := holder_of(held)) is not None else ""
            raise DraftsmithError(
                f"a run of {home} is alive (it holds {held}{who}): what it is going to read must stay; prune artifacts "
                "when it has ended"
            )
        yield


@dataclass(frozen=True)
class Unused(Leftover):
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


def unused(root: Path, before: float, needed: Collection[str]) -> list[Unused]:
    """Artifacts in the (resolved) folder of a store that were last used before a moment, largest first.

    before: seconds since the epoch; a run touches the manifest of what it reuses. needed: content ids of artifacts that
    stay whatever their age. What stays keeps all that it was made from, and files in the store that
    it was given as a path. A folder whose manifest cannot be read stays too.
    """
    there = dict(_artifacts(root))
    last = {place: max(_made(each), root.joinpath(*place, MANIFEST).stat().st_mtime) for place, each in there.items()}
    stays = {place for place, each in there.items() if last[place] >= before or each.content_id in needed}
    to_follow = [(root.joinpath(*place), there[place]) for place in stays]
    to_follow += [(folder, each) for folder, each in _replaced(root) if each.content_id in needed]
    while to_follow:
        new = {each for each in _sources(root, *to_follow.pop()) if each in there} - stays
        stays |= new
        to_follow += [(root.joinpath(*place), there[place]) for place in new]
    found = [_described(root, place, there[place], last[place]) for place in there.keys() - stays]
    return sorted(found, key=lambda each: -each.bytes)


def _artifacts(root: Path) -> Iterator[tuple[Place, Manifest]]:
    for folder in root.glob("[!.]*/[!.]*/"):
        if not folder.parent.name.endswith(SHARD):  # which `leftovers` knows
            with suppress(DraftsmithError):
                yield (folder.parent.name, folder.name), read_manifest(folder)


def _replaced(root: Path) -> Iterator[tuple[Path, Manifest]]:
    """A drafter of a line may be one: `leftovers` keeps it."""
    for folder in root.glob(f"[!.]*/{REPLACED}*/"):
        with suppress(DraftsmithError):
            yield folder, read_manifest(folder)


def _sources(root: Path, folder: Path, manifest: Manifest) -> Iterator[Place]:
    for entry in manifest.inputs.values():
        yield entry.stage, entry.key[:SHORT]
    for path in (*manifest.external, *elsewhere(folder)):
        with suppress(ValueError):  # outside the store
            stage, key, *_ = Path(path).resolve().relative_to(root).parts
            yield stage, key


def _made(manifest: Manifest) -> float:
    return datetime.fromisoformat(manifest.created_at).timestamp()


def _described(root: Path, place: Place, manifest: Manifest, last: float) -> Unused:
    folder = root.joinpath(*place)
    size = sum(path.stat().st_size for name in manifest.files if (path := folder / name).is_file())  # not fetched: none
    return Unused("artifact", folder, size, last, folder.with_name(f".lock-{folder.name}"))
