"""Files of rows that come while a stage reads others: they belong to the next run, and take nothing away from this."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store import Claim, Store
from draftsmith.artifacts.tracking import Tracking
from draftsmith.flows.pipeline.display import Display
from draftsmith.flows.pipeline.external import external_digests
from draftsmith.flows.pipeline.graph import Node
from draftsmith.flows.pipeline.node import Workshop, make
from draftsmith.flows.pipeline.process import StageOutcome, run_stage
from draftsmith.flows.pipeline.unchanged import unchanged
from draftsmith.stages.logs import LogsConfig
from draftsmith.stages.prompts import PromptsConfig
from tests.flows.pipeline.toy import TOY, ToyConfig, toy_nodes
from tests.flows.pipeline.toy_stages.combine import CombineConfig


@pytest.fixture
def bucket() -> Iterator[fsspec.AbstractFileSystem]:
    system = fsspec.filesystem("memory")
    for number in range(3):
        system.pipe_file(f"/live-bucket/{number:03}.jsonl", b"{}\n")
    yield system
    system.rm("/live-bucket", recursive=True)


def prompts_of(path: str) -> PromptsConfig:
    return PromptsConfig.model_validate({"sources": [{"kind": "jsonl", "path": path}], "train": 0, "heldout": 1})


@pytest.mark.parametrize("kind", ["logs", "prompts"])
@pytest.mark.parametrize(
    ("meanwhile", "names"),
    [
        (lambda system: system.pipe_file("/live-bucket/003.jsonl", b"{}\n"), None),
        (lambda system: system.pipe_file("/live-bucket/001.jsonl", b"{}\n{}\n"), "001"),
        (lambda system: system.rm("/live-bucket/002.jsonl"), "002"),
    ],
    ids=["another comes", "one grows", "one goes"],
)
def test_only_what_is_read_may_not_change(
    kind: str,
    meanwhile: Callable[[fsspec.AbstractFileSystem], None],
    names: str | None,
    bucket: fsspec.AbstractFileSystem,
    tmp_path: Path,
) -> None:
    path = "memory://live-bucket/*.jsonl"
    config = LogsConfig(paths=[path], temperature=0) if kind == "logs" else prompts_of(path)
    node, store, external = Node(kind, f"draftsmith.stages.{kind}", config), Store(tmp_path), external_digests(config)
    assert len(external) == 3

    def read() -> Path:
        with store.claim(kind, "c" * 64) as claim:
            assert isinstance(claim, Claim)
            with unchanged(store, node, {}, claim, external):
                (claim.work / "tokenised").write_text("hours")
                meanwhile(bucket)
            return claim.work / "tokenised"

    if names is None:
        assert read().is_file()
        assert len(external_digests(config)) == 4, "the next run reads it"
    else:
        with pytest.raises(DraftsmithError, match=rf"{names}\.jsonl changed while it was read: nothing of it was kept"):
            read()


def test_a_stage_reads_the_files_of_its_key(
    tmp_path: Path, tracking: Tracking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    config = ToyConfig(name="t", left=CombineConfig(addends=str(tmp_path / "numbers" / "*")))
    nodes = {node.name: node for node in toy_nodes(config)}
    workshop = Workshop(tmp_path / "home", config, TOY, Display(), tracking)
    (tmp_path / "numbers").mkdir()
    (tmp_path / "numbers" / "a").write_text("100")
    target = make(workshop, nodes["target"], {}).ref

    def come_and_run(*arguments: Any, **keywords: Any) -> StageOutcome:
        (tmp_path / "numbers" / "b").write_text("1000")
        return run_stage(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr("draftsmith.flows.pipeline.node.run_stage", come_and_run)
        made = make(workshop, nodes["left"], {"first": target}).ref
    assert json.loads((made.path / "numbers.json").read_text()) == [110]
    again = make(workshop, nodes["left"], {"first": target}).ref
    assert again.key != made.key and json.loads((again.path / "numbers.json").read_text()) == [1110]


def test_the_listing_of_a_config_is_no_part_of_it(tmp_path: Path) -> None:
    for name in "ba":
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    logs = LogsConfig(paths=[str(tmp_path)], temperature=0)
    pinned = logs.reading([str(tmp_path / "a.jsonl")])
    assert [Path(path).name for path in logs.files()] == ["a.jsonl", "b.jsonl"]
    assert [Path(path).name for path in pinned.files()] == ["a.jsonl"]
    assert pinned.model_copy(update={"rows": 3}).files() == pinned.files()
    assert pinned.model_dump() == logs.model_dump() and pinned.key_material() == logs.key_material()
    assert logs.listed_files is None
