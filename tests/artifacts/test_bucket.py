"""Objects by name, the same for every file system behind fsspec."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from draftsmith.artifacts.bucket import Bucket
from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from tests.testbed.s3 import bucket


@pytest.fixture(params=["s3", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bucket]:
    if request.param == "s3":
        with bucket("things"):
            yield Bucket("s3://things/of mine/", "DRAFTSMITH_STORE")
    elif request.param == "file":
        yield Bucket(f"file://{tmp_path}/bucket", "DRAFTSMITH_STORE")
    else:
        yield Bucket(f"memory://{tmp_path.name}", "DRAFTSMITH_STORE")


def test_objects_are_written_once_replaced_read_listed_and_deleted(store: Bucket, tmp_path: Path) -> None:
    assert store.read("a/none.json") is None and store.listed() == {} and store.read_all(["a/none.json"]) == {}
    assert store.create("a/one.json", b"1") and not store.create("a/one.json", b"2")
    assert store.read("a/one.json") == b"1"
    store.replace("a/one.json", b"three")
    (tmp_path / "file").write_bytes(b"x" * 1000)
    store.upload(tmp_path / "file", "a/b c/deep.bin")
    assert store.read_all(["a/one.json", "a/b c/deep.bin", "a/none"]) == {
        "a/one.json": b"three",
        "a/b c/deep.bin": b"x" * 1000,
    }
    listed = store.listed()
    assert {name: each.bytes for name, each in listed.items()} == {"a/one.json": 5, "a/b c/deep.bin": 1000}
    assert all(abs(time.time() - each.modified) < 3600 for each in listed.values())
    assert list(store.listed("a/b c")) == ["a/b c/deep.bin"] and store.listed("a/b") == {}
    assert store.download("a/b c/deep.bin", tmp_path / "copy") and not store.download("a/none", tmp_path / "none")
    assert (tmp_path / "copy").read_bytes() == b"x" * 1000
    store.delete(["a/b c/deep.bin"])
    assert list(store.listed()) == ["a/one.json"]


def test_the_check_writes_one_object(store: Bucket) -> None:
    for _ in range(2):
        store.check()
    assert store.listed()[".written-once"].bytes == 0


def test_a_bucket_that_is_not_there_is_told_by_its_address() -> None:
    with (
        bucket("things"),
        pytest.raises(DraftsmithError, match=r"^DRAFTSMITH_STORE: s3://thinsg/x: there is no such b"),
    ):
        Bucket("s3://thinsg/x", "DRAFTSMITH_STORE").check()


def test_a_client_that_overwrites_whatever_the_condition_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Bucket(f"memory://{tmp_path.name}", "DRAFTSMITH_STORE")
    write = type(store._system).pipe_file
    monkeypatch.setattr(type(store._system), "pipe_file", lambda self, path, value, **_mode: write(self, path, value))
    with pytest.raises(DraftsmithError, match=r"^DRAFTSMITH_STORE: memory://.* the second would overwrite the first"):
        store.check()


def test_a_full_disk_of_this_machine_is_not_the_network(store: Bucket) -> None:
    store.replace("one", b"1")
    with pytest.raises(OSError, match="No space left on device"):
        store.download("one", Path("/dev/full"))


def test_what_the_file_system_raises_is_worth_a_retry(store: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(*_args: object, **_more: object) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(type(store._system), "find", gone)
    with pytest.raises(RetryableError, match=r"cannot be listed \(no route to host\): check the address"):
        store.listed()
