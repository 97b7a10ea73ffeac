"""A file is hashed once, until it is touched."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store import checksums
from draftsmith.artifacts.store.checksums import Checksums
from draftsmith.artifacts.store.manifest import sha256_file


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every file that is hashed. Files that were written just now are cached too."""
    seen: list[Path] = []

    def hashed(path: Path) -> str:
        seen.append(path)
        return sha256_file(path)

    monkeypatch.setattr(checksums, "sha256_file", hashed)
    monkeypatch.setattr(checksums, "_CLOCK_RESOLUTION_S", -1.0)
    return seen


@pytest.fixture
def cached(tmp_path: Path) -> Checksums:
    (tmp_path / "home").mkdir()
    return Checksums(tmp_path / "home")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(b"bytes")
    return tmp_path / "weights"


def rewrite_with_old_times(path: Path) -> None:
    stat = path.stat()
    path.write_bytes(b"other")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def replace_with_old_times(path: Path) -> None:
    stat = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"other")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


@pytest.mark.parametrize(
    "touch", [rewrite_with_old_times, replace_with_old_times, lambda path: path.write_bytes(b"other")]
)
def test_a_touched_file_is_hashed_again_even_with_equal_size_and_time(
    touch: Callable[[Path], object], cached: Checksums, path: Path, reads: list[Path]
) -> None:
    before = cached.sha256(path)
    touch(path)
    assert cached.sha256(path) == sha256_file(path) != before
    assert len(reads) == 2


def test_a_file_is_hashed_once_a_week(
    cached: Checksums, path: Path, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = cached.checksum(path).at
    monkeypatch.setattr(checksums.time, "time", lambda: now + checksums.MAX_AGE_S - 1)
    assert cached.sha256(path) == Checksums(tmp_path / "home").sha256(path) == sha256_file(path)
    assert reads == [path]
    monkeypatch.setattr(checksums.time, "time", lambda: now + checksums.MAX_AGE_S + 1)
    cached.sha256(path)
    assert len(reads) == 2
    monkeypatch.setattr(checksums.time, "time", lambda: now - 60)
    cached.sha256(path)
    assert len(reads) == 3, "a record from the future does not count"


def test_the_checksum_of_a_file_written_just_now_is_not_cached(
    cached: Checksums, path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_CLOCK_RESOLUTION_S", 60.0)
    for _ in range(2):
        cached.sha256(path)
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_hashed_is_one_clear_error(
    cached: Checksums, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hashed(file: Path) -> str:
        with file.open("ab") as stream:
            stream.write(b"more")
        return sha256_file(file)

    monkeypatch.setattr(checksums, "sha256_file", hashed)
    with pytest.raises(DraftsmithError, match="weights: another process is writing to it"):
        cached.sha256(path)


def test_hashing_a_file_does_not_create_a_home(path: Path, tmp_path: Path) -> None:
    rewrite_with_old_times(path)
    assert Checksums(tmp_path / "none").sha256(path) == sha256_file(path)
    assert not (tmp_path / "none").exists()


def test_a_damaged_record_does_not_count(cached: Checksums, path: Path, tmp_path: Path, reads: list[Path]) -> None:
    """A flipped bit in a digest leaves another digest."""
    digest = cached.sha256(path)
    (record,) = (tmp_path / "home" / checksums.FOLDER).iterdir()
    record.write_text(record.read_text().replace(digest, digest[::-1]))
    assert cached.sha256(path) == digest and len(reads) == 2
