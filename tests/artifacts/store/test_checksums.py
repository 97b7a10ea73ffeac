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
def home(tmp_path: Path) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


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


def test_a_file_is_hashed_only_once(home: Path, tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"bytes")
    assert {Checksums(home).sha256(path) for _ in range(3)} == {sha256_file(path)}
    assert reads == [path]


@pytest.mark.parametrize(
    "touch", [rewrite_with_old_times, replace_with_old_times, lambda path: path.write_bytes(b"other")]
)
def test_a_touched_file_is_hashed_again_even_with_equal_size_and_time(
    touch: Callable[[Path], object], home: Path, tmp_path: Path, reads: list[Path]
) -> None:
    path, cached = tmp_path / "weights", Checksums(home)
    path.write_bytes(b"bytes")
    before = cached.sha256(path)
    touch(path)
    assert cached.sha256(path) == sha256_file(path) != before
    assert len(reads) == 2


def test_a_file_is_hashed_again_after_a_week(
    home: Path, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, cached = tmp_path / "weights", Checksums(home)
    path.write_bytes(b"bytes")
    now = cached.checksum(path).at
    monkeypatch.setattr(checksums.time, "time", lambda: now + checksums.MAX_AGE_S - 1)
    cached.sha256(path)
    assert len(reads) == 1
    monkeypatch.setattr(checksums.time, "time", lambda: now + checksums.MAX_AGE_S + 1)
    cached.sha256(path)
    assert len(reads) == 2
    monkeypatch.setattr(checksums.time, "time", lambda: now - 60)
    cached.sha256(path)
    assert len(reads) == 3, "a record from the future does not count"


def test_the_checksum_of_a_file_written_just_now_is_not_cached(
    home: Path, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_CLOCK_RESOLUTION_S", 60.0)
    path = tmp_path / "weights"
    path.write_bytes(b"bytes")
    for _ in range(2):
        Checksums(home).sha256(path)
    assert len(reads) == 2


def test_a_file_that_changes_while_it_is_hashed_is_one_clear_error(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_bytes(b"{}\n")

    def hashed(file: Path) -> str:
        with file.open("ab") as stream:
            stream.write(b"{}\n")
        return sha256_file(file)

    monkeypatch.setattr(checksums, "sha256_file", hashed)
    with pytest.raises(DraftsmithError, match=r"log\.jsonl: another process is writing to it"):
        Checksums(home).sha256(path)


def test_hashing_a_file_does_not_create_a_home(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    rewrite_with_old_times(path)
    assert Checksums(tmp_path / "none").sha256(path) == sha256_file(path)
    assert not (tmp_path / "none").exists()
