"""The hub's cache: the commit of a name, and checks of cached files; and a hub that fails. No test needs a network."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.manifest import ELSEWHERE, sha256_file
from draftsmith.flows.planning.external_files import external_digests
from draftsmith.stages.data.prompts.stage import HuggingFaceSource, PromptsConfig
from draftsmith.stages.data.prompts.streams import load_rows
from draftsmith.stages.drafters.checkpoint import drafter_source
from draftsmith.stages.runtime.stage import NOT_FETCHED
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.targets.hub import check_snapshot, hub_commit
from draftsmith.stages.targets.info import model_path
from draftsmith.stages.targets.stage import STAGE as TARGET
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


UNLISTED = "1.x reads a snapshot only with the list of files that it has stored next to it"


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
    pytest.importorskip("huggingface_hub", minversion="2", reason=UNLISTED)
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
    pytest.importorskip("huggingface_hub", minversion="2", reason=UNLISTED)
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


class _Hub(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if "hangs" in self.path:
            time.sleep(4)
        status = 404 if "absent" in self.path else 503
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


PROGRAM = textwrap.dedent(
    """
    import sys
    import time
    from pathlib import Path

    time.sleep = lambda _seconds: None  # the hub's library backs off, too

    from draftsmith.artifacts.errors import DraftsmithError
    from draftsmith.stages.drafters.checkpoint import drafter_source
    from draftsmith.stages.data.prompts.stage import HuggingFaceSource
    from draftsmith.stages.data.prompts.streams import load_rows
    from draftsmith.stages.targets.config import TargetConfig
    from draftsmith.stages.targets.body import resolve_target

    for name in ("org/ill", "org/hangs", "org/absent"):
        rows = HuggingFaceSource.model_validate({"kind": "huggingface", "id": name, "split": "train", "field": "x"})
        fetches = [
            lambda: resolve_target(TargetConfig(source=name), Path(sys.argv[1]), print),
            lambda: drafter_source(name, None),
            lambda: load_rows(rows),
        ]
        for fetch in fetches[: 2 if name == "org/hangs" else 3]:
            try:
                fetch()
            except DraftsmithError as error:
                print(name, type(error).__name__)
    """
)


def test_a_failing_or_slow_hub_is_retryable_and_a_refusal_is_not(tmp_path: Path, hub: str) -> None:
    told = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "http", "HTTP"))}
    limits = {"HF_HUB_ETAG_TIMEOUT": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment = {**told, **limits, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        *["org/ill RetryableError"] * 3,
        *["org/hangs RetryableError"] * 2,
        *["org/absent DraftsmithError"] * 3,
    ]
