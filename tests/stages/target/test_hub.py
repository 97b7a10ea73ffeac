"""The hub's cache: the commit of a name, and checks of cached files. No test needs a network."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.manifest import ELSEWHERE, sha256_file
from draftsmith.flows.planning.inputs import external_digests
from draftsmith.stages.data.prompt_streams import load_rows
from draftsmith.stages.data.prompts import HuggingFaceSource, PromptsConfig
from draftsmith.stages.drafters.checkpoint import drafter_source
from draftsmith.stages.runtime.stage import NOT_FETCHED
from draftsmith.stages.target.config import TargetConfig
from draftsmith.stages.target.hub import check_snapshot, hub_commit
from draftsmith.stages.target.info import model_path
from draftsmith.stages.target.stage import STAGE as TARGET
from draftsmith.stages.training.config import SftConfig
from tests.testbed.context import RecordingContext

FIRST, SECOND = "1" * 40, "2" * 40


class Cache:
    """The layout of the hub's cache: blobs by checksum, a folder of links for every commit, and references."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def add(self, repo: str, source: Path, commit: str, kind: str = "models") -> Path:
        """A folder's files as a commit, which `main` then means."""
        folder = self.root / f"{kind}--{repo.replace('/', '--')}"
        snapshot = folder / "snapshots" / commit
        (folder / "blobs").mkdir(parents=True, exist_ok=True)
        for path in source.rglob("*"):
            if path.is_file():
                content = path.read_bytes()
                git = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
                blob = folder / "blobs" / (sha256_file(path) if path.suffix == ".safetensors" else git)
                blob.write_bytes(content)
                link = snapshot / path.relative_to(source)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(blob)
        self.name(repo, commit, kind)
        return snapshot

    def name(self, repo: str, commit: str, kind: str = "models", name: str = "main") -> None:
        reference = self.root / f"{kind}--{repo.replace('/', '--')}" / "refs" / name
        reference.parent.mkdir(parents=True, exist_ok=True)
        reference.write_text(commit)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Return files like a drafter's, which are not read here."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text('{"block_size": 8}')
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 8)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cache:
    from huggingface_hub import constants

    root = tmp_path / "hub"
    root.mkdir()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(root))
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    return Cache(root)


def test_a_name_means_the_commit_that_the_cache_has(cache: Cache) -> None:
    assert hub_commit("org/drafter", None) is None
    cache.name("org/drafter", FIRST)
    cache.name("org/drafter", SECOND, name="v2")
    assert (hub_commit("org/drafter", None), hub_commit("org/drafter", "v2")) == (FIRST, SECOND)
    assert hub_commit("org/drafter", "3" * 40) == "3" * 40
    assert hub_commit("org/drafter", None, "dataset") is None, "of the same name"


def test_a_drafter_of_the_hub_is_keyed_by_its_commit_and_read_from_it(cache: Cache, checkpoint: Path) -> None:
    config = SftConfig(init_from="org/drafter")
    assert external_digests(config) == {"org/drafter": NOT_FETCHED}
    first = cache.add("org/drafter", checkpoint, FIRST)
    assert external_digests(config) == {"org/drafter": FIRST}
    assert drafter_source("org/drafter") == first
    second = cache.add("org/drafter", checkpoint, SECOND)
    assert external_digests(config) == {"org/drafter": SECOND}
    assert drafter_source("org/drafter") == second
    pinned = SftConfig(init_from="org/drafter", init_revision=FIRST)
    assert external_digests(pinned) == {"org/drafter": FIRST}
    assert drafter_source("org/drafter", FIRST) == first


def test_a_data_set_of_the_hub_is_keyed_by_its_commit_and_read_from_it(
    cache: Cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    fields: dict[str, Any] = {"sources": [{"kind": "huggingface", "id": "org/rows"}], "train": 1, "heldout": 1}
    config = PromptsConfig.model_validate(fields)
    assert external_digests(config) == {"datasets/org/rows": NOT_FETCHED}
    cache.name("org/rows", FIRST, "datasets")
    assert external_digests(config) == {"datasets/org/rows": FIRST}
    asked: list[Any] = []
    monkeypatch.setattr(datasets, "load_dataset", lambda *_place, **settings: asked.append(settings["revision"]))
    load_rows(HuggingFaceSource(id="org/rows"))
    load_rows(HuggingFaceSource(id="org/rows", revision=SECOND))
    load_rows(HuggingFaceSource(id=str(tmp_path)))
    assert asked == [FIRST, SECOND, None]


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_flipped_bit_in_the_hubs_cache_is_found(name: str, cache: Cache, checkpoint: Path) -> None:
    snapshot = cache.add("org/drafter", checkpoint, FIRST)
    check_snapshot(snapshot, sha256_file)
    blob = (snapshot / name).resolve()
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    with pytest.raises(DraftsmithError, match=rf"{name}: .*damaged.*{blob.name}"):
        drafter_source("org/drafter")


def test_files_without_a_checksum_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    check_snapshot(tmp_path, sha256_file)


def test_a_target_of_the_hub_lists_its_files(cache: Cache, plain_artifact: Path, tmp_path: Path) -> None:
    snapshot = cache.add("org/target", model_path(plain_artifact), FIRST)
    context = RecordingContext.under(tmp_path / "stage")
    TARGET.run(context, TargetConfig(source="org/target", dtype="float32"))
    files = json.loads((context.out / ELSEWHERE).read_text())
    assert {Path(path).name for path in files} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert all(Path(path).is_relative_to(snapshot) and sha256_file(Path(path)) == sha for path, sha in files.items())
    assert json.loads((context.out / "origin.json").read_text())["revision"] == FIRST
    assert ELSEWHERE in TARGET.volatile
