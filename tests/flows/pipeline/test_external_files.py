"""Files outside the store belong into the key of the stage that reads them."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from draftsmith.artifacts import checksums
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store import Store
from draftsmith.flows.pipeline import external
from draftsmith.flows.pipeline.graph import external_digests, plan
from draftsmith.flows.refresh.graph import REFRESH
from draftsmith.stages.logs import LogsConfig
from draftsmith.stages.prompts import PromptsConfig
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.training.config import SftConfig
from tests.testbed.refresh import load_config

QUICKSTART = Path(__file__).parents[3] / "configs" / "quickstart.yaml"


def jsonl(path: Path) -> PromptsConfig:
    return PromptsConfig.model_validate({"sources": [{"kind": "jsonl", "path": str(path)}], "train": 1, "heldout": 1})


def test_a_changed_prompt_file_changes_the_key_material(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n')
    before = external_digests(jsonl(path))
    path.write_text('{"prompt": "b"}\n')
    assert external_digests(jsonl(path)) != before


def test_the_weights_of_a_drafter_to_start_from_are_key_material(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"1")
    before = external_digests(SftConfig(init_from=str(tmp_path)))
    weights.write_bytes(b"2")
    after = external_digests(SftConfig(init_from=str(tmp_path)))
    assert before != after
    assert len(after) == 2


def test_every_file_of_a_folder_is_key_material(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"prompt": "a"}\n')
    logs = LogsConfig(paths=[str(tmp_path)], temperature=0)
    before = external_digests(logs)
    assert sorted(before) == [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    assert before == external_digests(jsonl(tmp_path))
    (tmp_path / "c.jsonl").write_text("")
    assert len(external_digests(logs)) == 3


def test_the_key_material_of_a_plain_file_is_its_path_and_sha256(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"{}")
    digest = "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    assert external_digests(jsonl(path)) == {str(path): digest}


def test_that_much_is_to_be_read_is_said_before_it_is_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(external, "_MUCH", 2 * 10**9 - 1)
    monkeypatch.setattr(checksums, "_CLOCK_S", -1.0)  # what was just written is remembered too
    monkeypatch.setattr(checksums, "sha256_file", lambda _path: "0" * 64)
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        with (tmp_path / name).open("wb") as file:
            file.truncate(10**9)  # of holes
    logs = LogsConfig(paths=[str(tmp_path)], temperature=0)
    assert len(external_digests(logs)) == 2
    assert len(caplog.messages) == 1 and "2 GB" in caplog.messages[0]
    external_digests(logs)
    assert len(caplog.messages) == 1


def test_a_changed_file_of_a_bucket_changes_the_key_material() -> None:
    system = fsspec.filesystem("memory")
    system.pipe_file("/key-bucket/a.jsonl", b"1")
    logs = LogsConfig(paths=["memory://key-bucket/*.jsonl"], temperature=0)
    before = external_digests(logs)
    assert len(before) == 1 and external_digests(logs) == before
    system.pipe_file("/key-bucket/a.jsonl", b"2")
    assert external_digests(logs) != before
    system.rm("/key-bucket", recursive=True)


def test_a_config_without_files_adds_nothing() -> None:
    assert external_digests(TargetConfig(source="Qwen/Qwen3-4B")) == {}
    assert external_digests(SftConfig()) == {}


def test_a_missing_prompt_file_is_named_before_anything_runs(tmp_path: Path) -> None:
    missing = tmp_path / "absent.jsonl"
    config = load_config(QUICKSTART, [f"prompts.sources.0={{kind: jsonl, path: {missing}}}"])
    with pytest.raises(DraftsmithError, match=r"prompts: .*absent\.jsonl is not an existing file"):
        plan(config, Store(tmp_path / "store"), REFRESH)
