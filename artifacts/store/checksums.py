"""Checksums of files that are read again and again: a file is hashed once, for as long as nothing touches it."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.manifest import sha256_file

FOLDER = "checksums"  # in the home
MAX_AGE_S = 7 * 24 * 3600.0  # a disk that forgets bits touches no file
_CLOCK_RESOLUTION_S = (
    2.0  # file systems tell times no finer: what changed so recently may change again and look the same
)


@dataclass(frozen=True)
class CachedChecksum:
    """What a file was when it was hashed."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    sha256: str
    at: float  # seconds since the epoch, before it was read

    @property
    def self_checksum(self) -> str:
        """Of what is known itself: a bit that the disk forgot in it must not accuse a file that is whole."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]

    def matches(self, stat: os.stat_result) -> bool:
        """Whether the file has not been touched since; contents that were written and put back count as touched."""
        known = (self.size, self.mtime_ns, self.ctime_ns, self.inode)
        return known == (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


class Checksums:
    """sha256 of files, remembered in a folder with one small file for each; one that cannot be written costs time."""

    def __init__(self, home: Path) -> None:
        self._folder = home / FOLDER

    def sha256(self, path: Path) -> str:
        """Of the file's content. Raises OSError if it cannot be read."""
        return self.checksum(path).sha256

    def checksum(self, path: Path) -> CachedChecksum:
        """The same, with when it was read. Raises DraftsmithError if it is written to meanwhile."""
        path = path.absolute()
        found, before, at = self._lookup(path), path.stat(), time.time()
        if found is not None:
            return found
        digest = sha256_file(path)
        now = CachedChecksum(
            str(path), before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino, digest, at
        )
        if not now.matches(path.stat()):
            raise DraftsmithError(f"{path}: somebody writes to it while it is read; give a copy that stays as it is")
        if at - before.st_ctime_ns / 1e9 > _CLOCK_RESOLUTION_S:
            self._remember(now)
        return now

    def cached(self, path: Path) -> CachedChecksum | None:
        """What is known of the file from the last time, whether it was touched since or not."""
        try:
            kept = json.loads(self._file(path.absolute()).read_bytes())
            known, whole = CachedChecksum(**kept["known"]), kept["sum"]
        except (OSError, ValueError, TypeError, KeyError):
            return None
        return known if whole == known.self_checksum and known.path == str(path.absolute()) else None

    def uncached_bytes(self, paths: Iterable[Path]) -> int:
        """Bytes of those files that would have to be read. Raises OSError for one that is gone."""
        return sum(path.stat().st_size for path in paths if self._lookup(path.absolute()) is None)

    def _lookup(self, path: Path) -> CachedChecksum | None:
        """What is known of a file, if nothing has touched it since and that is not too long ago."""
        found = self.cached(path)
        still = found is not None and found.matches(path.stat()) and 0 <= time.time() - found.at < MAX_AGE_S
        return found if still else None

    def _remember(self, known: CachedChecksum) -> None:
        if not self._folder.parent.is_dir():  # a home that is not there yet is not begun by looking at a file
            return
        with suppress(DraftsmithError):  # of a store that may only be read, everything is hashed again
            text = json.dumps({"known": asdict(known), "sum": known.self_checksum})
            write_text(self._file(Path(known.path)), text, durable=False)

    def _file(self, path: Path) -> Path:
        return self._folder / f"{hashlib.sha256(str(path).encode()).hexdigest()[:32]}.json"
