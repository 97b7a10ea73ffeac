"""Complete artifacts that nothing needs any more: no run has used them for long, no drafter line names them, and
nothing that stays was made from them."""

from __future__ import annotations

import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from draftsmith.artifacts.atomic import disk_errors
from draftsmith.artifacts.damage import SHARD
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.leftovers import Leftover
from draftsmith.artifacts.locks import is_locked, locked
from draftsmith.artifacts.manifest import Manifest, elsewhere, read_manifest
from draftsmith.artifacts.store import REPLACED, SHORT

Place = tuple[str, str]  # stage and short key: the folder in the store


@dataclass(frozen=True)
class Unused(Leftover):
    """A complete artifact; `touched` is when a run has last made or used it."""

    def remove(self) -> bool:
        """Delete it, unless a run holds it. Killed on the way, it is a replaced artifact and no damaged one."""
        assert self.lock is not None
        with disk_errors(f"removing {self.path}"):
            if is_locked(self.lock):
                return False
            with locked(self.lock):
                aside = self.path.with_name(f"{REPLACED}{self.path.name}-{time.time_ns()}")
                self.path.rename(aside)
                shutil.rmtree(aside)
        return True


def unused(root: Path, before: float, used: Mapping[Place, float], needed: Collection[str]) -> list[Unused]:
    """Artifacts in the folder of a store that were last used before a moment, largest first.

    before, and the values of `used`, which says when runs have used them: seconds since the epoch. needed: content ids
    of artifacts that stay whatever their age. What stays keeps all that it was made from, and files in the store that
    it was given as a path. A folder whose manifest cannot be read stays too.
    """
    there = dict(_artifacts(root))
    last = {place: max(_made(manifest), used.get(place, 0.0)) for place, manifest in there.items()}
    stays = {place for place, each in there.items() if last[place] >= before or each.content_id in needed}
    to_follow = list(stays)
    while to_follow:
        place = to_follow.pop()
        new = {each for each in _sources(root, place, there[place]) if each in there} - stays
        stays |= new
        to_follow += new
    found = [_described(root, place, there[place], last[place]) for place in there.keys() - stays]
    return sorted(found, key=lambda each: -each.bytes)


def _artifacts(root: Path) -> Iterator[tuple[Place, Manifest]]:
    for folder in root.glob("[!.]*/[!.]*/"):
        if not folder.parent.name.endswith(SHARD):  # which `leftovers` knows
            with suppress(DraftsmithError):
                yield (folder.parent.name, folder.name), read_manifest(folder)


def _sources(root: Path, place: Place, manifest: Manifest) -> Iterator[Place]:
    for entry in manifest.inputs.values():
        yield entry.stage, entry.key[:SHORT]
    for path in (*manifest.external, *elsewhere(root.joinpath(*place))):
        with suppress(ValueError):  # outside the store
            stage, key, *_ = Path(path).relative_to(root).parts
            yield stage, key


def _made(manifest: Manifest) -> float:
    return datetime.fromisoformat(manifest.created_at).timestamp()


def _described(root: Path, place: Place, manifest: Manifest, last: float) -> Unused:
    folder = root.joinpath(*place)
    size = sum(entry.bytes for entry in manifest.files.values())
    return Unused("artifact", folder, size, last, folder.with_name(f".lock-{folder.name}"))
