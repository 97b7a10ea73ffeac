"""The store within one process: keys, look-up, damage, force, resumption."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from pathlib import Path
from random import Random
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.locks import LockLostError
from draftsmith.artifacts.store.attempt import Attempt
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import (
    MANIFEST,
    Artifact,
    canonical_json,
    describe_files,
    parse_manifest,
)
from tests.testbed.artifacts import committed, fake_artifact, made_from

KEY = "ab" * 32
OTHER = "cd" * 32


def commit(claim: Attempt | Artifact, **changes: Any) -> Artifact:
    assert isinstance(claim, Attempt)
    return claim.commit(made_from(claim, **changes))


def make(store: Store, text: str = "answer", key: str = KEY, stage: str = "rollout", force: bool = False) -> Artifact:
    with store.claim(stage, key, force=force) as claim:
        if isinstance(claim, Artifact):
            return claim
        (claim.out / "data.txt").write_text(text)
        return commit(claim)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_the_home_is_absolute_and_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DRAFTSMITH_HOME", raising=False)
    assert home() == tmp_path / ".draftsmith"
    monkeypatch.setenv("DRAFTSMITH_HOME", "elsewhere")
    assert home() == tmp_path / "elsewhere"


def test_a_committed_artifact_is_found_with_its_manifest(store: Store) -> None:
    source = make(store, key=OTHER, stage="prompts")
    with store.claim("rollout", KEY) as claim:
        assert isinstance(claim, Attempt)
        (claim.out / "deep").mkdir()
        (claim.out / "deep" / "data.txt").write_text("answer")
        (claim.out / "metrics.jsonl").write_text("{}")
        (claim.work / "shard").write_text("unfinished")
        ref = commit(
            claim,
            config={"batch": 4},
            inputs={"prompts": source},
            metrics={"tau": 2.5, "loss": float("nan")},  # NaN has no JSON form
            volatile=("metrics.jsonl",),
        )
    assert store.find("rollout", KEY) == ref
    assert ref.uri.startswith("file:///")
    manifest = ref.manifest
    assert manifest.config == {"batch": 4}
    assert manifest.inputs["prompts"].content_id == source.content_id
    assert manifest.metrics == {"tau": 2.5}
    assert manifest.files["deep/data.txt"].bytes == 6
    assert manifest.files["metrics.jsonl"].volatile
    assert manifest.versions["python"].startswith("3.")
    assert not store.partial_path("rollout", KEY).exists()
    store.verify(ref)


def test_a_key_depends_on_each_of_its_inputs(tmp_path: Path) -> None:
    ref = fake_artifact("prompts", KEY, "1" * 64, tmp_path)
    base: dict[str, Any] = {
        "stage": "rollout",
        "code_digest": "c",
        "config": {"a": 1, "b": {"x": 2, "y": 3}},
        "inputs": {"prompts": ref},
        "seed": 0,
    }
    changes: list[dict[str, Any]] = [
        {"stage": "mining"},
        {"code_digest": "d"},
        {"config": {"a": 1, "b": {"x": 2, "y": 4}}},
        {"inputs": {"prompts": fake_artifact("prompts", KEY, "2" * 64, tmp_path)}},
        {"inputs": {}},
        {"seed": 1},
    ]
    assert len({Store.key(**(base | change)) for change in [{}, *changes]}) == len(changes) + 1
    moved = fake_artifact("prompts", OTHER, "1" * 64, tmp_path / "moved")
    same = {"config": {"b": {"y": 3, "x": 2}, "a": 1}, "inputs": {"prompts": moved}}
    assert Store.key(**(base | same)) == Store.key(**base), "the order of fields and the paths of inputs do not count"


def test_a_forced_claim_starts_empty_or_continues_a_forced_attempt(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    names: list[str] = []

    def attempt(force: bool, saved: str) -> list[str]:
        with store.claim("rollout", KEY, force=force) as claim:
            assert isinstance(claim, Attempt)
            names.append(claim.forced)
            saved_before = [path.read_text() for path in claim.work.iterdir()]
            (claim.work / "checkpoint").write_text(saved)
        return saved_before

    assert attempt(force=False, saved="broken") == []
    assert attempt(force=True, saved="half") == []
    assert caplog.text == ""
    assert attempt(force=True, saved="more") == ["half"]  # a retry, or the same command after an interruption
    assert f"delete {store.partial_path('rollout', KEY)}" in caplog.text
    assert attempt(force=False, saved="other") == ["more"]
    assert attempt(force=True, saved="") == []
    assert names[0] == names[3] == "" and names[1] == names[2] != names[4], "one id per forced attempt"


@pytest.mark.parametrize("force", [False, True])
def test_the_next_claim_finishes_a_failed_commit_without_the_stage(
    store: Store, monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    def full(path: Path, _text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    with monkeypatch.context() as patch:
        patch.setattr("draftsmith.artifacts.store.local.write_text", full)
        for _ in range(2):  # the disk is still full at the second attempt
            with pytest.raises(DraftsmithError, match="the disk is full"):
                make(store, "made once", force=force)
    assert store.find("rollout", KEY) is None
    with store.claim("rollout", KEY, force=force) as found:
        assert isinstance(found, Artifact)
    assert (found.path / "data.txt").read_text() == "made once"
    store.verify(found)
    assert make(store, "made again", force=True).content_id != found.content_id


def test_files_that_changed_after_a_failed_commit_are_made_again(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("draftsmith.artifacts.store.local.describe_files", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(store)
    (store.partial_path("rollout", KEY) / "out" / "data.txt").write_text("other answers")
    with store.claim("rollout", KEY) as claim:
        assert isinstance(claim, Attempt)


@pytest.mark.parametrize(
    "place",
    [
        ("stage",),
        ("key",),
        ("content_id",),
        ("inputs", "prompts", "key"),
        ("inputs", "prompts", "stage"),
        ("mlflow_run_id",),
    ],
)
def test_a_manifest_from_elsewhere_names_no_path(place: tuple[str, ...], store: Store) -> None:
    """A bucket's manifest becomes part of paths. It has a checksum, which anybody can compute."""
    ref = committed(store, "rollout", {"x": "x"}, inputs={"prompts": committed(store, "prompts", {"x": "x"})})
    fields = json.loads(ref.manifest.model_dump_json())
    *sections, last = place
    section = fields
    for name in sections:
        section = section[name]
    section[last] = "../.."
    checksum = hashlib.sha256(canonical_json(fields).encode()).hexdigest()
    with pytest.raises(DraftsmithError, match="not a readable manifest"):
        parse_manifest(json.dumps({**fields, "checksum": checksum}).encode(), "s3://bucket/manifest.json")


def test_nothing_is_committed_if_the_lock_is_lost_while_files_are_hashed(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashing a large artifact takes minutes, in which another process may take over the lock."""
    with store.claim("rollout", KEY) as claim:
        assert isinstance(claim, Attempt)
        (claim.out / "data.txt").write_text("late")
        lock = claim.lock.path

        def taken_over(*arguments: Any) -> Any:
            lock.unlink()
            return describe_files(*arguments)

        monkeypatch.setattr("draftsmith.artifacts.store.local.describe_files", taken_over)
        with pytest.raises(LockLostError):
            commit(claim)
    assert not store.path("rollout", KEY).exists()


def test_a_link_in_an_artifact_is_refused(store: Store, tmp_path: Path) -> None:
    with store.claim("rollout", KEY) as claim:
        assert isinstance(claim, Attempt)
        (claim.out / "weights").symlink_to(tmp_path)
        with pytest.raises(DraftsmithError, match=r"weights: an artifact holds only regular files"):
            commit(claim)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda ref: (ref.path / "data.txt").write_text("answe"), r"data\.txt: has 5 bytes instead of 6"),
        (lambda ref: (ref.path / "data.txt").unlink(), r"data\.txt: is missing"),
        (lambda ref: (ref.path / MANIFEST).write_text("{"), r"manifest\.json: not a readable manifest"),
        (lambda ref: (ref.path / MANIFEST).write_text('{"schema_version": 99}'), "schema version 99, this .* reads 1"),
        (lambda ref: (ref.path / MANIFEST).unlink(), r"manifest\.json: missing"),
    ],
)
def test_a_damaged_artifact_names_the_file_and_the_remedy_and_force_replaces_it(
    store: Store, damage: Any, message: str
) -> None:
    ref = make(store)
    damage(ref)
    with pytest.raises(DraftsmithError, match=f"{message}.*--force rollout"):
        store.find("rollout", KEY)
    again = make(store, force=True)
    assert (again.key, again.content_id) == (ref.key, ref.content_id)
    store.verify(again)


def test_verify_detects_a_changed_byte_and_an_added_file(store: Store) -> None:
    ref = make(store)
    (ref.path / "data.txt").write_text("Answer")
    assert store.find("rollout", KEY) == ref  # it compares only sizes
    with pytest.raises(DraftsmithError, match=r"data\.txt: has changed"):
        store.verify(ref)
    (ref.path / "data.txt").write_text("answer")
    store.verify(ref)
    (ref.path / "extra").write_text("")
    with pytest.raises(DraftsmithError, match=r"extra: is not part of the artifact"):
        store.verify(ref)


def test_a_flipped_bit_in_a_manifest_is_detected_or_harmless(store: Store) -> None:
    with store.claim("rollout", KEY) as claim:
        assert isinstance(claim, Attempt)
        (claim.out / "data.txt").write_text("answer")
        ref = commit(claim, config={"rate": 1e-4, "names": ["ä", {"b": 1.0}]}, metrics={"tau": 2.5})
    path, written, random = ref.path / MANIFEST, ref.manifest, Random(0)
    whole = path.read_bytes()
    for _ in range(200):
        content = bytearray(whole)
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        path.write_bytes(content)
        try:
            assert ref.manifest == written
        except DraftsmithError:
            continue
    path.write_bytes(whole.replace(b"2.5", b"2.4"))
    with pytest.raises(DraftsmithError, match=r"has changed since it was written.*--force rollout"):
        store.find("rollout", KEY)


def test_force_keeps_a_replaced_artifact_only_if_its_content_differs(store: Store) -> None:
    make(store, "same")
    make(store, "same", force=True)
    assert list(store.root.glob("rollout/.replaced-*")) == []
    new = make(store, "different", force=True)
    (replaced,) = store.root.glob("rollout/.replaced-*")
    assert (replaced / "data.txt").read_text() == "same"
    assert [manifest.content_id for manifest in store.list()] == [new.content_id]


def test_a_stage_key_content_id_path_or_uri_names_an_artifact_unless_it_is_ambiguous(store: Store) -> None:
    ref = make(store, "one", key="abcdef" + "0" * 58)
    for text in ("rollout", "abcdef00", "rollout/abcd", ref.content_id[:10], str(ref.path), ref.uri):
        assert store.resolve(text) == ref
    make(store, "two", key="abcdee" + "0" * 58)
    for text in ("rollout", "abcde"):
        with pytest.raises(DraftsmithError, match=f"'{text}' matches 2 artifacts"):
            store.resolve(text)
    assert store.resolve("abcdef") == ref
    with pytest.raises(DraftsmithError, match="no artifact matches 'sft'"):
        store.resolve("sft")


def test_an_unreadable_manifest_does_not_hide_the_others(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    broken = make(store, key=OTHER)
    whole = make(store)
    (broken.path / MANIFEST).write_text("")
    assert [manifest.key for manifest in store.list()] == [whole.key]
    assert OTHER[:16] in caplog.text
