"""Files outside the store are part of the cache key of the stage that reads them."""

from __future__ import annotations

from pathlib import Path

import fsspec

from draftsmith.flows.planning.external_files import external_digests
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.training.config import SftConfig
from tests.testbed.refresh import node_of


def test_the_weights_of_the_initial_drafter_are_part_of_the_key(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    before = external_digests(SftConfig(init_from=str(tmp_path)))
    weights.write_bytes(b"2")
    after = external_digests(SftConfig(init_from=str(tmp_path)))
    assert before != after
    assert len(after) == 2


def test_a_file_is_part_of_the_key_by_path_and_sha256(tmp_path: Path) -> None:
    (path := tmp_path / "prompts.jsonl").write_bytes(b"{}")
    prompts = node_of("prompts", sources=[{"kind": "jsonl", "path": str(path)}], train=1, heldout=1)
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert external_digests(prompts.config) == {str(path): digest}


def test_a_changed_file_in_a_bucket_changes_the_key() -> None:
    system = fsspec.filesystem("memory")
    system.pipe_file("/key-bucket/a.jsonl", b"1")
    logs = LogsConfig(paths=["memory://key-bucket/*.jsonl"], temperature=0)
    before = external_digests(logs)
    assert len(before) == 1 and external_digests(logs) == before
    system.pipe_file("/key-bucket/a.jsonl", b"2")
    assert external_digests(logs) != before
    system.rm("/key-bucket", recursive=True)
