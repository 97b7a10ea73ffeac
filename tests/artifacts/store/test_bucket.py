"""Objects of a bucket, on a local folder and on S3."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.store.bucket import Bucket
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


def test_objects_are_written_replaced_read_and_listed(store: Bucket, tmp_path: Path) -> None:
    assert store.read("a/none.json") is None and store.sizes() == {} and store.read_all(["a/none.json"]) == {}
    store.write("a/one.json", b"1")
    assert store.read("a/one.json") == b"1"
    store.write("a/one.json", b"three")
    (tmp_path / "file").write_bytes(b"x" * 1000)
    store.upload(tmp_path / "file", "a/b c/deep.bin")
    assert store.read_all(["a/one.json", "a/b c/deep.bin", "a/none"]) == {
        "a/one.json": b"three",
        "a/b c/deep.bin": b"x" * 1000,
    }
    assert store.sizes() == {"a/one.json": 5, "a/b c/deep.bin": 1000}
    assert list(store.sizes("a/b c")) == ["a/b c/deep.bin"] and store.sizes("a/b") == {}
    assert store.download("a/b c/deep.bin", tmp_path / "copy") and not store.download("a/none", tmp_path / "none")
    assert (tmp_path / "copy").read_bytes() == b"x" * 1000


def test_the_error_for_a_missing_bucket_names_its_address() -> None:
    with (
        bucket("things"),
        pytest.raises(DraftsmithError, match=r"^DRAFTSMITH_STORE: s3://thinsg/x: there is no such b"),
    ):
        Bucket("s3://thinsg/x", "DRAFTSMITH_STORE").check()


def test_a_full_local_disk_is_not_reported_as_a_network_error(store: Bucket) -> None:
    store.write("one", b"1")
    with pytest.raises(OSError, match="No space left on device"):
        store.download("one", Path("/dev/full"))


@pytest.mark.parametrize(("failures", "calls"), [(2, 3), (3, 3)])
def test_a_call_is_retried_and_then_fails_with_a_retryable_error(
    failures: int, calls: int, store: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def gone(_self: object, path: str, **_more: object) -> dict[str, object]:
        tried.append(path)
        if len(tried) <= failures:
            raise ConnectionError("no route\nto host")
        return {}

    monkeypatch.setattr("time.sleep", lambda _seconds: None)
    monkeypatch.setattr(type(store._system), "find", gone)
    if failures < calls:
        assert store.sizes() == {}
    else:
        with pytest.raises(RetryableError, match="no route to host"):
            store.sizes()
    assert len(tried) == calls
