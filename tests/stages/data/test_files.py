"""Files of rows: all formats give the same rows, folders and globs are in order, damage loses only what it hits.

Also at `s3://…`, from a server with the S3 protocol.
"""

from __future__ import annotations

import os
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import fsspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.row_files import BadRow, Row, local_files, match_files, read_rows, remote_versions
from tests.stages.data.row_files import SUFFIXES, content, packed, write
from tests.testbed.s3 import bucket

ROWS = [{"prompt": f"Frage {number}: süß?", "n": number} for number in range(700)]


def fields(files: list[str]) -> list[Any]:
    return [row.fields if isinstance(row, Row) else row.reason for row in read_rows(files)]


def read(path: Path) -> list[Row | BadRow]:
    return list(read_rows([str(path)]))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{suffix}", ROWS)
    assert fields([str(path)]) == ROWS
    assert [row.number for row in read(path)] == list(range(1, 701))


def test_a_folder_gives_its_row_files_in_order_including_rotated_ones(tmp_path: Path) -> None:
    names = ["2026/08/z.jsonl.zst", "2026/09/z.jsonl.gz", "a.jsonl", "a.jsonl-20261121.gz", "a.jsonl.1", "a.jsonl.2.gz"]
    names += ["b.json.2026-11-21T03.zst", "c.ndjson", "d.json.gz", "e.json", "f.parquet"]
    for name in reversed(names):
        write(tmp_path / name, [{"n": name}])
    for name in ("notes.txt", "_SUCCESS", ".hidden.jsonl", "_tmp/x.jsonl", "c.jsonl.part", "a.jsonl.1.tmp", "a.jsonl~"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"n": "not a log"}\n')
    assert [row["n"] for row in fields(match_files([str(tmp_path)], "logs.paths"))] == names


def test_patterns_keep_their_order_and_no_file_comes_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("logs/b.jsonl", "logs/a.jsonl", "logs/day/c.jsonl", "other.jsonl", "of[1].jsonl"):
        write(tmp_path / name, [{"n": 1}])
    assert match_files(["other.jsonl", "logs/*.jsonl", "logs"], "f") == [
        "other.jsonl",
        "logs/a.jsonl",
        "logs/b.jsonl",
        "logs/day/c.jsonl",
    ]
    assert match_files(["logs/**/*.jsonl"], "f") == ["logs/a.jsonl", "logs/b.jsonl", "logs/day/c.jsonl"]
    assert match_files(["log?"], "f") == ["logs/a.jsonl", "logs/b.jsonl", "logs/day/c.jsonl"]
    assert match_files(["of[1].jsonl"], "f") == ["of[1].jsonl"], "no glob"
    assert local_files(["memory://x/y", "other.jsonl"], "f") == [tmp_path / "other.jsonl"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("none.jsonl", "none.jsonl is not an existing file. Correct the path"),
        ("*.jsonl", "matches no file. Correct the pattern"),
        ("empty", r"empty has no file of rows \(.jsonl, .ndjson or .json with"),
        ("memory://bucket/none.jsonl", "memory://bucket/none.jsonl matches no file"),
        ("memory://bucket/*.jsonl", "matches no file"),
        ("warp://bucket/a.jsonl", "warp://bucket/a.jsonl: .*warp"),
    ],
)
def test_a_pattern_without_a_file_is_an_error(
    pattern: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DraftsmithError, match=f"^logs.paths: .*{message}") as caught:
        match_files([pattern], "logs.paths")
    assert "\n" not in str(caught.value)


def test_a_file_name_that_is_not_utf8_is_an_error(tmp_path: Path) -> None:
    """Such as one from a machine with another encoding: neither a key nor a manifest can hold it."""
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).touch()
    with pytest.raises(DraftsmithError, match=r"^logs\.paths: .*/caf\\udce9\.jsonl"):
        local_files([str(tmp_path)], "logs.paths")


def test_an_error_of_the_bucket_is_reported_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> bool:
        raise RuntimeError("Unable to locate\ncredentials")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "isdir", refuse)
    with pytest.raises(DraftsmithError, match=r"Unable to locate credentials.*Check the address") as caught:
        match_files(["memory://bucket/logs"], "logs.paths")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_bad_line_leaves_the_other_rows_readable(suffix: str, tmp_path: Path) -> None:
    lines = [b'\xef\xbb\xbf{"n": 1}', b'{"n": 2', b'{"n": "\xff"}', b"", b"[4]", b"[" * 100_000, b'{"n": 7}']
    (path := tmp_path / f"rows{suffix}").write_bytes(packed(b"\n".join(lines), suffix))
    first, half, encoding, array, deep, last = read(path)
    assert isinstance(first, Row) and isinstance(last, Row)
    assert (first.fields, last.fields, last.number) == ({"n": 1}, {"n": 7}, 7)
    for row, number, message in ((half, 2, "not JSON"), (encoding, 3, "not UTF-8"), (array, 5, "a JSON array, not an")):
        assert isinstance(row, BadRow) and row.number == number and message in row.reason
    assert isinstance(deep, BadRow)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_line_without_an_end_takes_no_memory_beyond_the_limit(suffix: str, tmp_path: Path) -> None:
    (path := tmp_path / f"rows{suffix}").write_bytes(packed(b'{"n": 1}\n' + b"x" * 10**8 + b'\n{"n": 3}', suffix))
    assert suffix == ".jsonl" or path.stat().st_size < 200_000
    tracemalloc.start()
    try:
        first, long, last = read(path)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()
    assert isinstance(first, Row) and isinstance(last, Row) and (last.fields, last.number) == ({"n": 3}, 3)
    assert long == BadRow(str(path), 2, "longer than 16 MB: every line must be one JSON object")


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst"])
def test_rows_before_a_truncation_are_read(suffix: str, tmp_path: Path) -> None:
    rows = [{"n": random.Random(number).getrandbits(200)} for number in range(20_000)]
    whole = content(rows, suffix)
    (path := tmp_path / f"rows{suffix}").write_bytes(whole[: len(whole) * 3 // 4])
    *good, bad = read(path)
    assert [row.fields for row in good if isinstance(row, Row)] == rows[: len(good)]
    assert 10_000 < len(good) < 15_100
    assert isinstance(bad, BadRow) and "damaged or truncated" in bad.reason and bad.number == len(good) + 1


def test_a_damaged_parquet_file_is_one_bad_row(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", ROWS)
    path.write_bytes(path.read_bytes()[:-20])
    (bad,) = read(path)
    assert isinstance(bad, BadRow) and "not a whole Parquet file" in bad.reason
    write(tmp_path / "b.jsonl", ROWS[:1])
    (path := tmp_path / "c.parquet.gz").write_bytes(b"x")
    (packed_whole,) = read(path)
    assert isinstance(packed_whole, BadRow) and "unpack it" in packed_whole.reason


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DraftsmithError, match=r"gone\.jsonl does not exist"):
        read(tmp_path / "gone.jsonl")


@settings(max_examples=150, deadline=None)
@given(
    suffix=st.sampled_from(SUFFIXES),
    cut=st.floats(0, 1),
    flips=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=4),
)
def test_damaged_files_give_rows_or_bad_rows(
    suffix: str, cut: float, flips: list[tuple[float, int]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """An intact file that was then truncated and given wrong bytes."""
    data = bytearray(content(ROWS[:50], suffix))
    for place, value in flips:
        data[int(place * (len(data) - 1))] = value
    path = tmp_path_factory.mktemp("damage") / f"x{suffix}"
    path.write_bytes(data[: int(cut * len(data))])
    for row in read(path):
        assert isinstance(row, Row | BadRow)


@pytest.fixture
def put() -> Iterator[None]:
    """Create a bucket `answers` with rows in every format, and other files."""
    names = [*(f"rows{suffix}" for suffix in SUFFIXES), "_tmp/c.jsonl", "notes.txt"]
    with bucket("answers"):
        for name in names:
            boto3.client("s3").put_object(Bucket="answers", Key=f"week/{name}", Body=content(ROWS[:9], name))
        yield


@pytest.mark.usefixtures("put")
def test_rows_of_an_s3_bucket_equal_those_on_disk() -> None:
    for suffix in SUFFIXES:
        files = match_files([f"s3://answers/week/rows{suffix}"], "logs.paths")
        assert fields(files) == ROWS[:9]
    assert len(fields(match_files(["s3://answers/week"], "logs.paths"))) == 9 * len(SUFFIXES)
    assert len(match_files(["s3://answers/*/rows*.gz"], "logs.paths")) == sum("gz" in suffix for suffix in SUFFIXES)
    with pytest.raises(DraftsmithError, match=r"^logs\.paths: .*s3://answers/none\.jsonl"):
        match_files(["s3://answers/none.jsonl"], "logs.paths")


@pytest.mark.usefixtures("put")
def test_a_changed_object_has_another_version() -> None:
    address = "s3://answers/week/rows.jsonl"
    before = remote_versions([address], "logs.paths")
    assert len(before) == 1 and remote_versions([address], "logs.paths") == before
    boto3.client("s3").put_object(Bucket="answers", Key="week/rows.jsonl", Body=content(ROWS[1:10], ".jsonl"))
    assert remote_versions([address], "logs.paths") != before
    assert fields([address]) == ROWS[1:10] and len(list(read_rows([address]))) == 9
