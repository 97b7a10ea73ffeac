"""A crash during a commit leaves the artifact complete or absent; a commit that has returned is durable."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.attempt import Attempt
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.stages.runtime.checkpoint import load_checkpoint, save_checkpoint
from tests.artifacts.store.forgetful_disk import NAMES_AHEAD, SYNCED, Crash, ForgetfulDisk
from tests.artifacts.store.test_store import KEY, commit

FILES = {"table.parquet": "rows", "drafter/model.safetensors": "weights", "deep/down/one": "part"}


def make(store: Store, content: str, *, force: bool = False) -> Artifact:
    with store.claim("rollout", KEY, force=force) as claim:
        assert isinstance(claim, Attempt)
        for name, text in FILES.items():
            path = claim.out / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{text} {content}")
        (claim.work / "checkpoint").write_text("step 7")
        return commit(claim)


def lost(crash: Crash, folder: Path, extreme: str, allowed: set[str]) -> str | None:
    """Return what this crash would lose, or None. allowed: contents that may remain ("" stands for no artifact)."""
    crash.leaves(folder, extreme)
    store = Store(folder / "store")
    try:
        with store.claim("rollout", KEY) as found:
            if isinstance(found, Attempt):
                return None if "" in allowed else "the artifact is gone"
            store.verify(found)
        content = (found.path / "table.parquet").read_text()
        return None if content.removeprefix("rows ") in allowed else f"it holds {content!r}"
    except DraftsmithError as error:
        return str(error)


def crashed_everywhere(
    folder: Path, monkeypatch: pytest.MonkeyPatch, *, old: bool = False, ignored: str | None = None
) -> tuple[list[str], set[str]]:
    """Commit once and crash at every call; return the losses, and the places that fsyncs were called from."""
    home = folder / "home"
    home.mkdir(parents=True)
    store = Store(home / "store")
    if old:
        make(store, "old")
    disk = ForgetfulDisk(home, ignored=ignored)
    with monkeypatch.context() as patched, disk.watching(patched.setattr):
        make(store, "new", force=old)
    assert len(disk.crashes) > 20
    losses = []
    for number, crash in enumerate(disk.crashes):
        ended = crash is disk.crashes[-1]
        allowed = {"new"} if ended else {"new", "old" if old else ""}
        for extreme in (SYNCED, NAMES_AHEAD):
            loss = lost(crash, folder / f"{number} {extreme}", extreme, allowed)
            if loss is not None:
                losses.append(f"after call {number} ({crash.after}), {extreme}: {loss}")
    return losses, set(disk.sites)


@pytest.mark.parametrize("old", [False, True])
def test_a_crash_anywhere_in_a_commit_loses_nothing(old: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, _ = crashed_everywhere(tmp_path, monkeypatch, old=old)
    assert losses == []


def test_every_fsync_of_a_commit_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, sites = crashed_everywhere(tmp_path / "all", monkeypatch)
    assert len(sites) >= 5
    for number, site in enumerate(sorted(sites)):
        losses, _ = crashed_everywhere(tmp_path / str(number), monkeypatch, ignored=site)
        assert losses, f"{site}: nothing is lost without this fsync"


def test_a_crash_anywhere_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    work.mkdir()
    save_checkpoint(work, 1, {"reached": 1})
    disk = ForgetfulDisk(work)
    with monkeypatch.context() as patched, disk.watching(patched.setattr):
        save_checkpoint(work, 2, {"reached": 2})
    for number, crash in enumerate(disk.crashes):
        for extreme in (SYNCED, NAMES_AHEAD):
            crash.leaves(left := tmp_path / f"{number} {extreme}", extreme)
            found = load_checkpoint(left, lambda _line: None)
            assert found is not None and found[1] == {"reached": found[0]}, crash.after
            assert found[0] in ((2,) if crash is disk.crashes[-1] else (1, 2)), "a saved checkpoint stays"
