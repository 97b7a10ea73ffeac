"""Prune never removes what a run holds, what is recent, what is needed, or the inputs of these."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.locks import LockTimeoutError, locked
from draftsmith.artifacts.store.attempt import Attempt
from draftsmith.artifacts.store.local import REPLACED, Store
from draftsmith.artifacts.store.manifest import ELSEWHERE, MANIFEST, Artifact
from draftsmith.artifacts.store.retention import artifacts_in_use, exclusive_for_prune, leftovers, unused_artifacts
from tests.testbed.artifacts import committed

OLD, YOUNG, KEY = "ab" * 32, "cd" * 32, "ef" * 32
DAY = 86400.0
LATER = time.time() + 10 * DAY  # after everything that a test makes, however late the suite comes to it


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


# ---- leftovers


def attempt(store: Store, key: str, age_days: float) -> Path:
    """Create an unfinished attempt that was last touched `age_days` ago."""
    with store.claim("sft", key) as claim:
        assert isinstance(claim, Attempt)
        (claim.work / "checkpoint.pt").write_bytes(b"x" * 100)
    age(store.partial_path("sft", key), age_days)
    return store.partial_path("sft", key)


def age(path: Path, days: float) -> None:
    for each in [path, *path.rglob("*")]:
        os.utime(each, (time.time() - days * DAY,) * 2)


def artifact(store: Store, content: str, *, force: bool = False) -> Path:
    return committed(store, "target", {"x": content}, KEY, force=force).path


def test_unused_copies_of_uploaded_drafters_are_removed(tmp_path: Path) -> None:
    copy = tmp_path / "uploaded" / OLD[:16]
    (copy / "drafter").mkdir(parents=True)
    (copy / "drafter" / "model.safetensors").write_bytes(b"x" * 100)
    age(copy, 40)
    os.utime(copy)
    assert leftovers(tmp_path, time.time() - 30 * DAY) == [], "used today"
    age(copy, 40)
    (found,) = leftovers(tmp_path, time.time() - 30 * DAY)
    assert found.kind == "copy of an uploaded drafter" and found.remove() and not copy.exists()


def test_shards_stay_while_an_attempt_of_their_stage_may_use_them(tmp_path: Path, store: Store) -> None:
    shard = committed(store, "mining.shard", {"x": "rows"}, KEY).path
    (old,) = leftovers(tmp_path, time.time() + 1)
    with store.claim("mining", OLD) as node:
        assert isinstance(node, Attempt)
        assert leftovers(tmp_path, time.time() + 1) == [] and not old.remove()
    assert [each.kind for each in leftovers(tmp_path, time.time() + 1)] == ["unfinished attempt"] and not old.remove()
    committed(store, "mining", {"x": "rows"}, OLD)
    (old,) = leftovers(tmp_path, time.time() + 1)
    assert old.path == shard and old.remove() and not shard.exists()


def test_old_attempts_replaced_artifacts_and_logs_are_removed_and_artifacts_stay(tmp_path: Path, store: Store) -> None:
    old, young = attempt(store, OLD, 40), attempt(store, YOUNG, 20)
    made = artifact(store, "first")
    age(made, 40)
    artifact(store, "second", force=True)  # the first one is only renamed: others may have been made from it
    assert [each.kind for each in leftovers(tmp_path, time.time() - 30 * DAY)] == ["unfinished attempt"]
    age(tmp_path / "store" / "target", 40)
    (tmp_path / "logs").mkdir()
    for name in ("sft-1.log", "sft-1.request.json", "sft-1.failed.json"):
        (tmp_path / "logs" / name).write_text("x")
    age(tmp_path / "logs", 40)
    found = leftovers(tmp_path, time.time() - 30 * DAY)
    assert sorted(each.kind for each in found) == ["log", "log", "replaced artifact", "unfinished attempt"]
    assert all(each.remove() for each in found)
    assert not old.exists() and young.exists()
    assert (made / "x").read_text() == "second"
    assert [path.name for path in (tmp_path / "logs").iterdir()] == ["sft-1.failed.json"]
    assert leftovers(tmp_path, time.time() - 30 * DAY) == []


def test_an_attempt_that_a_run_continues_stays(tmp_path: Path, store: Store) -> None:
    old = attempt(store, OLD, 40)
    (found,) = leftovers(tmp_path, time.time() - 30 * DAY)
    with store.claim("sft", OLD):
        assert leftovers(tmp_path, time.time() - 30 * DAY) == []
        assert not found.remove()
    assert (old / "work" / "checkpoint.pt").exists()
    assert found.remove() and not old.exists()


# ---- complete artifacts


def made(store: Store, stage: str, inputs: dict[str, Artifact] | None = None) -> Artifact:
    return committed(store, stage, {"x": stage}, f"{stage:x<4}".encode().hex(), inputs=inputs or {})


def used(ref: Artifact, at: float = LATER) -> None:
    """Touch an artifact as a run does that reuses it."""
    os.utime(ref.path / MANIFEST, (at, at))


def stages(store: Store, *, needed: tuple[str, ...] = ()) -> set[str]:
    """Return the stages of the unused artifacts."""
    return {each.path.parent.name for each in unused_artifacts(store.root, LATER, needed)}


@pytest.fixture
def chain(store: Store) -> list[Artifact]:
    """A target, its answers, and two drafters trained on them."""
    target = made(store, "target")
    answers = made(store, "rollout", {"target": target})
    return [target, answers, *(made(store, name, {"answers": answers}) for name in ("sft", "opd"))]


def test_a_used_artifact_stays_with_its_inputs(store: Store, chain: list[Artifact]) -> None:
    _, answers, sft, _ = chain
    assert unused_artifacts(store.root, time.time() - 1000, ()) == [], "all are recent"
    assert stages(store) == {"target", "rollout", "sft", "opd"}
    assert stages(store, needed=(chain[3].content_id,)) == {"sft"}
    used(sft, LATER - 1)
    assert stages(store) == {"target", "rollout", "sft", "opd"}
    used(answers)
    assert stages(store) == {"sft", "opd"}
    used(sft)
    assert stages(store) == {"opd"}


def test_artifacts_that_were_read_by_path_stay(store: Store) -> None:
    """A config may name an artifact's folder as a model or a file, and a stage may list what it reads there."""
    target, other, elsewhere = made(store, "target"), made(store, "other"), made(store, "model")
    named = {str(target.path / "x"): "digest", "/srv/elsewhere": "digest", "s3://bucket/a.jsonl": "digest"}
    sft = committed(store, "sft", {ELSEWHERE: f'{{"{elsewhere.path}/x": "digest"}}'}, external=named)
    assert stages(store, needed=(sft.content_id,)) == {other.stage}


def test_nothing_is_removed_if_an_artifacts_inputs_cannot_be_read(store: Store, chain: list[Artifact]) -> None:
    (chain[0].path / ELSEWHERE).write_text("{")
    with pytest.raises(DraftsmithError, match=rf"{ELSEWHERE}: cannot be read \(truncated or edited\)"):
        used(chain[0])
        stages(store)


def test_damaged_artifacts_shards_and_attempts_are_not_unused_artifacts(store: Store, chain: list[Artifact]) -> None:
    (chain[2].path / MANIFEST).write_text("{")
    made(store, "mining.shard")
    with store.claim("prompts", "cd" * 32):
        assert stages(store) == {"target", "rollout", "opd"}


def test_an_unused_artifact_is_removed_atomically_unless_a_run_holds_it(
    store: Store, chain: list[Artifact], monkeypatch: pytest.MonkeyPatch
) -> None:
    used(chain[2])
    (found,) = unused_artifacts(store.root, LATER, ())
    assert found.path == chain[3].path and found.bytes == len("opd") and found.lock is not None
    with locked(found.lock):
        assert not found.remove() and store.find("opd", chain[3].key) is not None
    with monkeypatch.context() as killed:
        killed.setattr(shutil, "rmtree", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            found.remove()
    assert store.find("opd", chain[3].key) is None, "absent, not damaged"
    (renamed,) = Path(store.root / "opd").glob(f"{REPLACED}*")
    assert (renamed / "x").is_file() and not (renamed / MANIFEST).exists(), "it is a leftover, no artifact"
    used(chain[2], 0)
    used(chain[1])
    (sft,) = unused_artifacts(store.root, LATER, ())
    assert sft.remove() and not list((store.root / "sft").glob("[!.l]*")) and not list((store.root / "sft").glob(".r*"))


def test_inputs_of_a_lines_drafter_stay_even_if_its_key_was_made_again(store: Store, chain: list[Artifact]) -> None:
    opd = chain[3]
    opd.path.rename(opd.path.with_name(f"{REPLACED}{opd.path.name}-1"))
    assert stages(store, needed=(opd.content_id,)) == {"sft"}


def test_prune_excludes_runs_and_runs_wait_for_it(tmp_path: Path) -> None:
    alive = pytest.raises(DraftsmithError, match=r"is alive \(it holds .*lock-artifacts: run another, pid")
    one, another = artifacts_in_use(tmp_path, "one"), artifacts_in_use(tmp_path, "another")  # runs share the lock
    with one, another, alive, exclusive_for_prune(tmp_path):
        pass
    messages: list[str] = []
    with (
        exclusive_for_prune(tmp_path),
        pytest.raises(LockTimeoutError),
        artifacts_in_use(tmp_path, "one", messages.append, limit_s=0),
    ):
        pass
    assert len(messages) == 1 and "(run prune --artifacts, pid" in messages[0]
