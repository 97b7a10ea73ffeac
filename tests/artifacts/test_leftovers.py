"""What may be pruned: never an artifact, never what a run holds, never what is young."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from draftsmith.artifacts.leftovers import leftovers
from draftsmith.artifacts.store import Claim, Store

OLD, YOUNG, KEY = "ab" * 32, "cd" * 32, "ef" * 32
DAY = 86400.0


def attempt(store: Store, key: str, age_days: float) -> Path:
    """An unfinished attempt, last touched so long ago."""
    with store.claim("sft", key) as claim:
        assert isinstance(claim, Claim)
        (claim.work / "checkpoint.pt").write_bytes(b"x" * 100)
    age(store.partial("sft", key), age_days)
    return store.partial("sft", key)


def age(path: Path, days: float) -> None:
    for each in [path, *path.rglob("*")]:
        os.utime(each, (time.time() - days * DAY,) * 2)


def artifact(store: Store, content: str, *, force: bool = False) -> Path:
    with store.claim("target", KEY, force=force) as claim:
        assert isinstance(claim, Claim)
        (claim.out / "x").write_text(content)
        return store.commit(claim, config={}, inputs={}, code_digest="c", seed=0).path


def test_copies_of_uploaded_drafters_that_nobody_uses_go(tmp_path: Path) -> None:
    copy = tmp_path / "uploaded" / OLD[:16]
    (copy / "drafter").mkdir(parents=True)
    (copy / "drafter" / "model.safetensors").write_bytes(b"x" * 100)
    age(copy, 40)
    os.utime(copy)
    assert leftovers(tmp_path, time.time() - 30 * DAY) == [], "used today"
    age(copy, 40)
    (found,) = leftovers(tmp_path, time.time() - 30 * DAY)
    assert found.what == "copy of an uploaded drafter" and found.remove() and not copy.exists()


def test_old_shards_go(tmp_path: Path) -> None:
    with (store := Store(tmp_path / "store")).claim("mining.shard", KEY) as claim:
        assert isinstance(claim, Claim)
        (claim.out / "x").write_text("rows")
        made = store.commit(claim, config={}, inputs={}, code_digest="c", seed=0).path
    assert leftovers(tmp_path, time.time() - 30 * DAY) == []
    age(made, 40)
    (found,) = leftovers(tmp_path, time.time() - 30 * DAY)
    assert found.what == "shard" and found.remove() and not made.exists()


def test_shards_stay_as_long_as_a_node_of_their_stage_may_join_them(tmp_path: Path, store: Store) -> None:
    def made() -> Path:
        with store.claim("mining.shard", KEY) as claim:
            assert isinstance(claim, Claim)
            (claim.out / "x").write_text("rows")
            return store.commit(claim, config={}, inputs={}, code_digest="c", seed=0).path

    shard = made()
    (old,) = leftovers(tmp_path, time.time() + 1)
    with store.claim("mining", OLD) as node:
        assert isinstance(node, Claim)
        assert leftovers(tmp_path, time.time() + 1) == [] and not old.remove()
    assert [each.what for each in leftovers(tmp_path, time.time() + 1)] == ["unfinished attempt"] and not old.remove()
    with store.claim("mining", OLD) as node:
        assert isinstance(node, Claim)
        (node.out / "x").write_text("rows")
        store.commit(node, config={}, inputs={}, code_digest="c", seed=0)
    (old,) = leftovers(tmp_path, time.time() + 1)
    assert old.path == shard and old.remove() and not shard.exists()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_old_attempts_replaced_artifacts_and_logs_go_and_artifacts_stay(tmp_path: Path, store: Store) -> None:
    old, young = attempt(store, OLD, 40), attempt(store, YOUNG, 20)
    made = artifact(store, "first")
    age(made, 40)
    artifact(store, "second", force=True)  # the first one is kept, hidden: others may have been made from it
    assert [each.what for each in leftovers(tmp_path, time.time() - 30 * DAY)] == ["unfinished attempt"]
    age(tmp_path / "store" / "target", 40)
    (tmp_path / "logs").mkdir()
    for name in ("sft-1.log", "sft-1.request.json", "other.json"):
        (tmp_path / "logs" / name).write_text("x")
    age(tmp_path / "logs", 40)
    found = leftovers(tmp_path, time.time() - 30 * DAY)
    assert sorted(each.what for each in found) == ["log", "log", "replaced artifact", "unfinished attempt"]
    assert all(each.remove() for each in found)
    assert not old.exists() and young.exists()
    assert (made / "x").read_text() == "second"
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["other.json"]
    assert leftovers(tmp_path, time.time() - 30 * DAY) == []


def test_an_attempt_that_a_run_takes_up_stays(tmp_path: Path, store: Store) -> None:
    old = attempt(store, OLD, 40)
    (found,) = leftovers(tmp_path, time.time() - 30 * DAY)
    with store.claim("sft", OLD):
        assert leftovers(tmp_path, time.time() - 30 * DAY) == []
        assert not found.remove()
    assert (old / "work" / "checkpoint.pt").exists()
    assert found.remove() and not old.exists()


def test_a_home_without_anything_has_no_leftovers(tmp_path: Path) -> None:
    assert leftovers(tmp_path / "none", time.time()) == []
