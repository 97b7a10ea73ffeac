"""Checksums that are kept: one reading as long as nothing touches the file, another as soon as something does."""

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
    """Every file that is hashed; the clock is fine enough for a file that was only just written."""
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


def put_back(path: Path) -> None:
    stat = path.stat()
    path.write_bytes(b"other")
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def exchanged(path: Path) -> None:
    stat = path.stat()
    other = path.with_name("other")
    other.write_bytes(b"other")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(path)


def test_a_file_is_read_once_by_whoever_asks(home: Path, tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"bytes")
    assert {Checksums(home).sha256(path) for _ in range(3)} == {sha256_file(path)}
    assert reads == [path]


@pytest.mark.parametrize("touch", [put_back, exchanged, lambda path: path.write_bytes(b"other")])
def test_a_touched_file_is_read_again_also_if_size_and_time_are_the_same(
    touch: Callable[[Path], object], home: Path, tmp_path: Path, reads: list[Path]
) -> None:
    path, kept = tmp_path / "weights", Checksums(home)
    path.write_bytes(b"bytes")
    before = kept.sha256(path)
    touch(path)
    assert kept.sha256(path) == sha256_file(path) != before
    assert len(reads) == 2


def test_a_file_is_read_again_after_a_week(
    home: Path, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path, kept = tmp_path / "weights", Checksums(home)
    path.write_bytes(b"bytes")
    now = kept.checksum(path).at
    monkeypatch.setattr(checksums.time, "time", lambda: now + checksums.MAX_AGE_S - 1)
    kept.sha256(path)
    assert len(reads) == 1
    monkeypatch.setattr(checksums.time, "time", lambda: now + checksums.MAX_AGE_S + 1)
    kept.sha256(path)
    assert len(reads) == 2
    monkeypatch.setattr(checksums.time, "time", lambda: now - 60)
    kept.sha256(path)
    assert len(reads) == 3, "a record from the future says nothing of the file's last week"


def test_what_was_written_a_moment_ago_is_not_kept_as_known(
    home: Path, tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checksums, "_CLOCK_RESOLUTION_S", 60.0)
    path = tmp_path / "weights"
    path.write_bytes(b"bytes")
    for _ in range(2):
        Checksums(home).sha256(path)
    assert len(reads) == 2


def test_a_record_that_lost_a_bit_accuses_no_file(home: Path, tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"bytes")
    Checksums(home).sha256(path)
    (record,) = (home / checksums.FOLDER).iterdir()
    whole = record.read_bytes()
    for place in range(len(whole)):
        record.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert Checksums(home).sha256(path) == sha256_file(path), place
    assert len(reads) > 1


def test_a_file_that_is_written_to_while_it_is_read_is_one_clear_error(
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


def test_a_home_that_is_not_there_yet_is_not_begun_by_looking_at_a_file(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    put_back(path)
    assert Checksums(tmp_path / "none").sha256(path) == sha256_file(path)
    assert not (tmp_path / "none").exists()
