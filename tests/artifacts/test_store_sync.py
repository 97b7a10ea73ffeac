"""What a loss of power leaves: a commit brings everything to the disk, in the order that makes the folder whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.manifest import MANIFEST, ArtifactRef
from draftsmith.artifacts.store import Claim, Store

KEY = "ab" * 32


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[tuple[str, str]]]:
    """(what, path) of every sync and rename, as the kernel is asked for them."""
    seen: list[tuple[str, str]] = []

    def short(path: Any) -> str:
        return os.path.relpath(path, tmp_path)

    def fsync(fd: int, real: Any = os.fsync) -> None:
        seen.append(("sync", short(Path(f"/proc/self/fd/{fd}").readlink())))
        real(fd)

    def renaming(real: Any) -> Any:
        def rename(source: Any, target: Any, **options: Any) -> None:
            real(source, target, **options)
            seen.append(("rename", f"{short(source)} -> {short(target)}"))

        return rename

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", renaming(os.rename))
    monkeypatch.setattr(os, "replace", renaming(os.replace))
    yield seen


def test_a_commit_syncs_files_folders_manifest_and_both_sides_of_the_rename(
    tmp_path: Path, calls: list[tuple[str, str]]
) -> None:
    store = Store(tmp_path / "store")
    with store.claim("sft", KEY) as claim:
        assert isinstance(claim, Claim)
        (claim.out / "drafter").mkdir()
        (claim.out / "drafter" / "model.safetensors").write_bytes(b"weights")
        (claim.out / "metrics.jsonl").write_text("{}")
        calls.clear()
        ref = store.commit(claim, config={}, inputs={}, code_digest="c", seed=0)
    assert isinstance(ref, ArtifactRef)
    out, final = f"store/sft/.partial-{KEY[:16]}/out", f"store/sft/{KEY[:16]}"
    steps = _in_order(calls)
    files = [("sync", f"{out}/drafter/model.safetensors"), ("sync", f"{out}/metrics.jsonl")]
    folders = [("sync", f"{out}/drafter"), ("sync", out)]
    manifest = [("sync", f"{out}/{MANIFEST}"), ("rename", f"{out}/{MANIFEST}"), ("sync", out)]
    # a name on the disk is worth nothing if the folders above it are not there
    install = [("rename", f"{out} -> {final}"), ("sync", "store/sft"), ("sync", "store"), ("sync", ".")]
    assert sorted(steps[: len(files)]) == files
    assert sorted(steps[len(files) : len(files) + len(folders)], reverse=True) == folders
    assert steps[len(files) + len(folders) :] == manifest + install


def _in_order(calls: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """A file that is written beside its name and renamed to it counts under that name."""
    found = []
    for what, path in calls:
        source = path.partition(" -> ")[0]
        folder, _, name = source.rpartition("/")
        beside = name.startswith(".tmp-")
        found.append((what, f"{folder}/{name.split('-', 2)[2]}" if beside else path))
    return found
