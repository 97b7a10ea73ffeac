"""A cache of file checksums: a file is hashed again only if it was touched, or after a week."""

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

FOLDER = "checksums"  # folder in the home
MAX_AGE_S = 7 * 24 * 3600.0  # after this a file is hashed again: bit rot changes no file times
_CLOCK_RESOLUTION_S = 2.0  # of the coarsest file systems: a file changed since then may change again unnoticed


@dataclass(frozen=True)
class CachedChecksum:
    """A file's checksum, with its size, times and inode when it was hashed."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    sha256: str
    at: float  # seconds since the epoch, just before it was hashed

    def matches(self, stat: os.stat_result) -> bool:
        """Return whether the file is untouched since. Content that was changed and restored counts as touched."""
        hashed = (self.size, self.mtime_ns, self.ctime_ns, self.inode)
        return hashed == (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino)


class Checksums:
    """The sha256 of files, cached in a folder of the home. Each small cache file holds its own checksum, and JSON.

    If the cache cannot be written, files are hashed every time.
    """

    def __init__(self, home: Path) -> None:
        self._folder = home / FOLDER

    def sha256(self, path: Path) -> str:
        """Return the sha256 of a file's content. Raises OSError if the file cannot be read."""
        return self.checksum(path).sha256

    def checksum(self, path: Path) -> CachedChecksum:
        """Return the file's record, hashing it if need be. Raises DraftsmithError if the file changes meanwhile."""
        path = path.absolute()
        cached, before, at = self._lookup(path), path.stat(), time.time()
        if cached is not None:
            return cached
        digest = sha256_file(path)
        now = CachedChecksum(
            str(path), before.st_size, before.st_mtime_ns, before.st_ctime_ns, before.st_ino, digest, at
        )
        if not now.matches(path.stat()):
            raise DraftsmithError(f"{path}: another process is writing to it. Use a copy that does not change.")
        if at - before.st_ctime_ns / 1e9 > _CLOCK_RESOLUTION_S:
            self._remember(now)
        return now

    def cached(self, path: Path) -> CachedChecksum | None:
        """Return the file's last record, even if the file was touched since; None if there is none."""
        try:
            checksum, _, text = self._file(path.absolute()).read_text().partition("\n")
            record = CachedChecksum(**json.loads(text if checksum == _sha256(text) else ""))
        except (OSError, ValueError, TypeError):
            return None
        return record if record.path == str(path.absolute()) else None

    def uncached_bytes(self, paths: Iterable[Path]) -> int:
        """Return the total bytes of the files that would have to be hashed. Raises OSError for a missing file."""
        return sum(path.stat().st_size for path in paths if self._lookup(path.absolute()) is None)

    def _lookup(self, path: Path) -> CachedChecksum | None:
        """Return the file's record if the file was not touched since and the record is recent, else None."""
        record = self.cached(path)
        valid = record is not None and record.matches(path.stat()) and 0 <= time.time() - record.at < MAX_AGE_S
        return record if valid else None

    def _remember(self, record: CachedChecksum) -> None:
        if not self._folder.parent.is_dir():  # reading a file must not create a home
            return
        with suppress(DraftsmithError):  # a read-only home
            text = json.dumps(asdict(record))
            write_text(self._file(Path(record.path)), f"{_sha256(text)}\n{text}", durable=False)

    def _file(self, path: Path) -> Path:
        return self._folder / f"{_sha256(str(path))[:32]}.json"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
