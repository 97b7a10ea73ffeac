"""Prompts and logged answers of a target with LoRA adapters: whose each row is."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import ADAPTED_TRAJECTORIES, TRAJECTORIES
from draftsmith.stages.data.logs.earlier import TABLE
from draftsmith.stages.data.trajectories import load_prompts, load_trajectories, prompt_labels
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import EmbeddedEngine
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.data.logs.logs_run import earlier
from tests.stages.data.logs.logs_run import run as run_logs
from tests.stages.data.prompts_run import error, of_classes, run_with_context
from tests.stages.data.row_files import write
from tests.testbed.adapters import adapted_artifact
from tests.testbed.context import RecordingContext
from tests.testbed.random_target import write_artifact

Row = dict[str, Any]


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapted_artifact(tmp_path_factory.mktemp("adapted"), a=3, b=3, c=3)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("plain"))


def test_without_a_name_the_prompts_of_each_source_have_all_adapters_in_equal_shares(
    adapted: Path, plain: Path, tmp_path: Path
) -> None:
    sources = [{"kind": "jsonl", "path": str(write(tmp_path / f"{n}.jsonl", of_classes(n, 20, 12)))} for n in "xy"]
    sources.append({"kind": "reasoning_gym", "tasks": ["chain_sum"]})  # type: ignore[dict-item]
    rows, ctx = run_with_context(adapted, tmp_path / "1", sources, train=27, heldout=9)
    again, _ = run_with_context(adapted, tmp_path / "2", sources, run_seed=5, train=27, heldout=9)
    bare, without = run_with_context(plain, tmp_path / "3", sources, train=27, heldout=9)
    assert rows == again == bare  # the same prompts
    for name in ("adapters", "labels"):
        table = (ctx.out / f"{name}.parquet").read_bytes()
        assert table == (tmp_path / "2" / "out" / f"{name}.parquet").read_bytes()
        assert not (without.out / f"{name}.parquet").exists()
    assert "slices" not in json.loads((without.out / "prompts.json").read_text())
    for split, each in (("train", 3), ("heldout", 1)):
        prompts, labels = load_prompts(ctx.out, [split]), prompt_labels(ctx.out, load_prompts(ctx.out, [split]).ids)
        dealt = Counter((label[0], prompt.adapter) for label, prompt in zip(labels, prompts, strict=True))
        assert dealt == {(source, name): each for source in ("x.jsonl", "y.jsonl", "chain_sum") for name in "abc"}
        assert [label[1:] for label in labels] == [(f"adapter:{prompt.adapter}",) for prompt in prompts]
        assert Counter(prompt.adapter for prompt in prompts[:9]) == dict.fromkeys("abc", 3)  # and any range of them
        assert {prompt.adapter for prompt in load_prompts(without.out, [split])} == {""}


@pytest.mark.parametrize(("field", "fields"), [("adapter", {}), ("lora", {"adapter": "lora"})])
def test_rows_that_name_adapters_have_the_shares_of_the_traffic(
    field: str, fields: Row, adapted: Path, plain: Path, tmp_path: Path
) -> None:
    names = ["a", "a", "base", None, "c", ""]
    rows = [{**row, field: names[i % 6], "kind": "x"} for i, row in enumerate(of_classes("Question", 24, 6))]
    path = write(tmp_path / "rows.jsonl", rows)
    source = {"kind": "jsonl", "path": str(path), "fields": fields}
    settings: Row = {"train": 24, "heldout": 6, "slices": ["kind"]}
    prompts, ctx = run_with_context(adapted, tmp_path / "1", [source], **settings)
    by_text = {row["prompt"]: row[field] for row in rows}
    texts = {row["prompt_id"]: row["messages"][0]["content"] for row in prompts}
    for prompt in load_prompts(ctx.out, ["train", "heldout"]):
        name = by_text[texts[prompt.prompt_id]]
        assert prompt.adapter == ("" if name in (None, "base") else name)
        (label,) = prompt_labels(ctx.out, [prompt.prompt_id])
        assert label == ("rows.jsonl", "kind:x", f"adapter:{prompt.adapter or 'base'}")
    slices = json.loads((ctx.out / "prompts.json").read_text())["slices"]
    assert {name: sum(counts.values()) for name, counts in slices.items()} == {
        "kind:x": 30, "adapter:a": 10, "adapter:base": 15, "adapter:c": 5,
    }  # fmt: skip
    _, ignored = run_with_context(plain, tmp_path / "2", [source], **settings)  # the field means nothing
    assert not (ignored.out / "adapters.parquet").exists()


@pytest.mark.parametrize("name", ["d", 3, ["a"], {"a": 1}, True])
def test_a_row_that_names_an_unknown_adapter_is_an_error_with_its_place(
    name: Any, adapted: Path, tmp_path: Path
) -> None:
    rows = [{**row, "adapter": name if i == 4 else "a"} for i, row in enumerate(of_classes("Question", 9, 3))]
    path = write(tmp_path / "rows.jsonl", rows)
    text = error(adapted, tmp_path / "1", path, train=4, heldout=1)
    assert (
        f"rows.jsonl, row 5: adapter {name!r} is none of the target's (a, b, c). Add it to target.adapters, or" in text
    )


def logs(folder: Path, target: Path, rows: list[Row], **config: Any) -> RecordingContext:
    path = write(folder / f"{len(list(folder.iterdir()))}.jsonl", rows)
    return run_logs(folder / path.stem, target, path, **config)


def test_logged_answers_are_read_and_scored_under_their_adapters(adapted: Path, plain: Path, tmp_path: Path) -> None:
    target, rng = Target.load(adapted, device="cpu"), np.random.default_rng(0)
    names = ["a", "", "b", "c"] * 4
    asked = [Request(str(i), rng.integers(0, 60, 5).tolist(), 20, adapter=name) for i, name in enumerate(names)]
    answered = {done.request.request_id: done for done in EmbeddedEngine(target, capacity=32).generate(asked)}
    rows = [
        {
            "prompt_token_ids": r.prompt_ids,
            "completion_token_ids": answered[r.request_id].response_ids,
            "lora": r.adapter,
        }
        for r in asked
    ]
    ctx = logs(tmp_path, adapted, rows, fields={"adapter": "lora"})
    stored = load_trajectories(ctx.out).trajectories
    adapter_of = {tuple(r.prompt_ids): r.adapter for r in asked}
    assert len(stored) > 8 and {each.adapter for each in stored} == {"a", "", "b", "c"}
    assert all(each.adapter == adapter_of[tuple(each.tokens[:5])] for each in stored)
    assert [t.adapter for t in stored[2:5]] == [stored[i].adapter for i in (2, 3, 4)]
    assert ctx.summaries["improbable"] == 0 and not [line for line in ctx.logs if line.startswith("warning")]

    swapped = [row | {"lora": {"a": "b", "b": "a"}.get(str(row["lora"]), row["lora"])} for row in rows]
    allowed = {"fields": {"adapter": "lora"}, "max_foreign_share": 1}
    assert logs(tmp_path, adapted, swapped, **allowed).summaries["improbable"] >= 4
    unnamed = logs(tmp_path, adapted, rows, scored=0)
    assert any("no row names an adapter of the target" in line for line in unnamed.logs)
    assert {each.adapter for each in load_trajectories(unnamed.out).trajectories} == {""}
    ignored = logs(tmp_path, plain, rows, scored=0, fields={"adapter": "lora"})
    columns = read_table(ignored.out / TABLE, TRAJECTORIES).column_names
    assert columns == TRAJECTORIES.columns.names
    with pytest.raises(DraftsmithError, match=r"row 3: adapter 'z' is none of the target's \(a, b, c\)"):
        logs(tmp_path, adapted, [row | ({"lora": "z"} if i == 2 else {}) for i, row in enumerate(rows)],
             fields={"adapter": "lora"}, scored=0)  # fmt: skip

    # mixed into the next refresh
    before = earlier(tmp_path / "before", ctx)
    fresh = [{"prompt_token_ids": [1, 2, i], "completion_token_ids": [3, 4, 5], "adapter": "b"} for i in range(8)]
    mixed = logs(tmp_path, adapted, fresh, inputs={"earlier": before}, replay_share=0.5, scored=0)
    replayed = read_table(mixed.out / TABLE, ADAPTED_TRAJECTORIES).to_pylist()[8:]
    assert len(replayed) >= 6
    assert all(row["adapter"] == adapter_of[tuple(row["prompt_ids"])] for row in replayed)
