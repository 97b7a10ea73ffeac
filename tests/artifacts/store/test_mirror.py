"""A store mirrored in a bucket, seen from two homes: uploads, downloads, damage and races; objects of a bucket."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.store.attempt import Attempt
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import MANIFEST, Artifact
from draftsmith.artifacts.store.mirror import STORE_VARIABLE, Bucket, open_store
from tests.artifacts.store.test_store import KEY, OTHER, commit, make
from tests.testbed.s3 import SECRET, bucket


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


ADDRESS = "s3://lines/drafters"
KEY_16 = KEY[:16]


@pytest.fixture(scope="module")
def served() -> Iterator[None]:
    with bucket("lines"):
        yield


@pytest.fixture
def a(served: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:  # noqa: ARG001
    """The store as home A sees it, empty."""
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    for name in objects():
        boto3.client("s3").delete_object(Bucket="lines", Key=f"drafters/{name}")
    monkeypatch.setenv(STORE_VARIABLE, ADDRESS)
    return open_store(tmp_path / "a")


@pytest.fixture
def b(a: Store, tmp_path: Path) -> Store:  # noqa: ARG001
    """The same store, as home B sees it."""
    return open_store(tmp_path / "b")


def objects() -> dict[str, int]:
    found = boto3.client("s3").list_objects_v2(Bucket="lines", Prefix="drafters/").get("Contents", [])
    return {each["Key"].removeprefix("drafters/"): each["Size"] for each in found}


def files_of(name: str) -> list[str]:
    return [each for each in objects() if each.endswith(f"/{name}")]


def flip(name: str) -> None:
    client = boto3.client("s3")
    content = bytearray(client.get_object(Bucket="lines", Key=f"drafters/{name}")["Body"].read())
    content[0] ^= 1
    client.put_object(Bucket="lines", Key=f"drafters/{name}", Body=bytes(content))


def two_files(store: Store, *, key: str = KEY, force: bool = False, texts: tuple[str, str] = ("one", "two")) -> Any:
    with store.claim("rollout", key, force=force) as claim:
        if isinstance(claim, Artifact):
            return claim
        (claim.out / "deep").mkdir(exist_ok=True)
        (claim.out / "a.txt").write_text(texts[0])
        (claim.out / "deep" / "b.txt").write_text(texts[1])
        return commit(claim)


def found_in(store: Store) -> Artifact:
    found = store.find("rollout", KEY)
    assert found is not None
    return found


def test_another_home_finds_an_artifact_and_fetches_it_on_demand(a: Store, b: Store) -> None:
    made = two_files(a)
    assert b.find("rollout", OTHER) is None
    found = found_in(b)
    assert (found.key, found.content_id, found.volatile_id) == (made.key, made.content_id, made.volatile_id)
    assert [m.key for m in b.list()] == [KEY] and b.resolve("rollout").path == found.path == b.path("rollout", KEY)
    b.verify_once(found)  # nothing is here yet
    assert [path.name for path in found.path.rglob("*")] == [MANIFEST]
    b.fetch(found, ["a.txt"])
    assert sorted(path.name for path in found.path.iterdir()) == ["a.txt", MANIFEST]
    b.fetch(found)
    assert (found.path / "deep" / "b.txt").read_text() == "two"
    b.verify(found)
    with b.claim("rollout", KEY) as claim:
        assert claim == found
    assert b.localize(made.path / "deep") == found.path / "deep"  # a path of home A


def test_damage_in_the_bucket_is_reported_by_name_and_repaired_by_force(a: Store, b: Store) -> None:
    two_files(a)
    (name,) = files_of("b.txt")
    flip(name)
    found = found_in(b)
    with pytest.raises(DraftsmithError) as refused:
        b.fetch(found)
    message = str(refused.value)
    assert message.startswith(f"{ADDRESS}/{name}: ") and "`--force rollout`" in message
    assert not (found.path / "deep" / "b.txt").exists()
    again = two_files(b, force=True)  # equal content replaces the damaged object
    assert again.content_id == found.content_id
    third = open_store(b.root.parent.parent / "c")
    third.verify(found_in(third))

    flip(f"rollout/{KEY_16}/{MANIFEST}")
    with pytest.raises(DraftsmithError, match=rf"{ADDRESS}/rollout/{KEY_16}/{MANIFEST}: .*not a readable manifest"):
        b.find("rollout", KEY)
    assert a.path("rollout", KEY).is_dir()
    two_files(a, force=True)  # also from the home that has a copy
    assert found_in(b)


def test_an_interrupted_upload_creates_no_artifact_and_is_continued(
    a: Store, b: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload, sent = Bucket.upload, list[str]()

    def lost(self: Bucket, path: Path, name: str) -> None:
        sent.append(name)
        if len(sent) == 2:
            raise RetryableError("the network is gone")
        upload(self, path, name)

    monkeypatch.setattr(Bucket, "upload", lost)
    with pytest.raises(RetryableError):
        two_files(a)
    assert len(objects()) == 1
    assert a.find("rollout", KEY) is None and b.find("rollout", KEY) is None and a.list() == []
    with a.claim("rollout", KEY) as done:  # commits without the stage
        assert isinstance(done, Artifact)
    assert len(sent) == 3 and sent[2] == sent[1], "the first file is not uploaded again"
    b.verify(found_in(b))


def test_the_first_of_two_concurrent_commits_counts(a: Store, b: Store, caplog: pytest.LogCaptureFixture) -> None:
    with a.claim("rollout", KEY) as one, b.claim("rollout", KEY) as other:
        assert isinstance(one, Attempt) and isinstance(other, Attempt)
        for claim, text in ((one, "first"), (other, "second")):
            (claim.out / "same.txt").write_text("same")
            (claim.out / "data.txt").write_text(text)
        made = commit(one)
        with caplog.at_level(logging.WARNING):
            taken = commit(other)
    assert "another host made rollout/" in caplog.text
    assert taken.content_id == made.content_id and taken.path == b.path("rollout", KEY)
    b.fetch(taken)
    assert (taken.path / "data.txt").read_text() == "first"
    b.verify(taken)


def test_force_replaces_an_artifact_and_its_readers_keep_the_old_one(a: Store, b: Store) -> None:
    make(a, "old")
    old = found_in(b)
    new = make(a, "new", force=True)
    b.fetch(old)
    assert (old.path / "data.txt").read_text() == "old"
    found = found_in(b)
    assert found.content_id == new.content_id != old.content_id
    b.fetch(found)
    assert (found.path / "data.txt").read_text() == "new"
    assert len(files_of("data.txt")) == 2
    b.verify(found)


def test_an_artifact_from_before_the_bucket_is_uploaded_and_not_made_again(a: Store, b: Store, tmp_path: Path) -> None:
    before = make(Store(tmp_path / "a" / "store"))
    assert a.find("rollout", KEY) is None
    with a.claim("rollout", KEY) as claim:
        assert isinstance(claim, Artifact) and claim.content_id == before.content_id
    assert found_in(b)
    damaged = make(Store(tmp_path / "a" / "store"), key=OTHER)
    (damaged.path / "data.txt").write_text("anSwer")
    with a.claim("rollout", OTHER) as claim:
        assert isinstance(claim, Attempt)  # damaged, so it is made again


@pytest.mark.parametrize("verify", ["verify_once", "verify"])
def test_a_damaged_local_copy_is_fetched_again(
    verify: str, a: Store, b: Store, caplog: pytest.LogCaptureFixture
) -> None:
    made = make(a).path / "data.txt"
    found = found_in(b)
    b.fetch(found)
    copy = found.path / "data.txt"
    copy.write_text("anSwer")
    getattr(b, verify)(found)
    assert copy.read_text() == made.read_text()
    assert f"{copy}: has changed since it was written" in caplog.text
    copy.write_text("cut")  # a file of the wrong size counts as missing
    b.fetch(found)
    b.verify(found)

    (name,) = files_of("data.txt")
    flip(name)
    copy.write_text("anSwer")
    with pytest.raises(DraftsmithError, match=rf"^{ADDRESS}/{name}: has changed since it was uploaded"):
        getattr(b, verify)(found)


def test_a_read_only_home_can_read_the_store(a: Store, tmp_path: Path) -> None:
    make(a)
    (tmp_path / "r").mkdir(mode=0o500)
    assert found_in(reader := open_store(tmp_path / "r")).key == reader.list()[0].key == KEY


@pytest.mark.usefixtures("a")
def test_bad_addresses_are_refused_and_errors_hold_no_secrets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for address, why in (
        ("bucket/prefix", "bucket/prefix is not an address"),
        (f"s3://me:{SECRET}@bucket/prefix", "an address with a user or password in it"),
        ("nonesuch://bucket", "nonesuch"),
    ):
        monkeypatch.setenv(STORE_VARIABLE, address)
        with pytest.raises(DraftsmithError, match=f"^{STORE_VARIABLE}: .*{why}") as refused:
            open_store(tmp_path)
        assert SECRET not in str(refused.value)
    monkeypatch.setenv(STORE_VARIABLE, "s3://no-such-bucket/x")
    assert open_store(tmp_path).find("rollout", KEY) is None
    monkeypatch.setenv(STORE_VARIABLE, ADDRESS)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:9/{SECRET}")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(RetryableError, match="Check the address, the credentials") as lost:
        open_store(tmp_path).find("rollout", KEY)
    assert SECRET not in str(lost.value) and "127.0.0.1:9/***" in str(lost.value) and ADDRESS in str(lost.value)
