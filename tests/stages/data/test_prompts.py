"""Stage `prompts`: tokens, disjoint splits with the configured counts, repeatable results, and clear errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.stages.data import row_files
from draftsmith.stages.data.prompts.stage import STAGE, PromptsConfig
from draftsmith.stages.data.stored_prompts import prompt_labels
from draftsmith.stages.targets.info import load_tokenizer, model_path
from tests.stages.data.prompts_run import Row, error, of_classes, questions, run, run_with_context, texts
from tests.stages.data.row_files import write
from tests.testbed.context import StoppingContext


def test_tokens_end_where_the_template_begins_the_answer(target: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "Tell a story."}])
    (row,) = run(target, tmp_path, path, train=1, heldout=0, system="Be kind.")
    text = load_tokenizer(model_path(target)).decode(row["token_ids"])
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nTell a story.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert row["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tell a story."}]


def test_a_repeated_text_is_used_once(target: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question  number {index % 10}?" + " " * (index // 10)} for index in range(30)]
    path = write(tmp_path / "a.jsonl", rows)
    other = questions(tmp_path / "b.jsonl", 20)
    sources: list[Row] = [{"kind": "jsonl", "path": str(path)}, {"kind": "jsonl", "path": str(other)}]
    # file a holds 10 different texts and b the same 10 and 10 more
    selected, context = run_with_context(target, tmp_path, sources, train=4, heldout=4, heldout_share=0.5)
    plain = {" ".join(row["messages"][-1]["content"].split()) for row in selected}
    assert len(plain) == 8
    assert context.summaries["duplicates_removed"] > 0


def test_sources_with_equal_shares_alternate(target: Path, tmp_path: Path) -> None:
    other = [{"q": row["prompt"]} for row in of_classes("B", 2, 1)]
    paths = [write(tmp_path / "a.jsonl", of_classes("A", 3, 1)), write(tmp_path / "b.jsonl", other)]
    sources: list[Row] = [
        {"kind": "jsonl", "path": str(paths[0])},
        {"kind": "jsonl", "path": str(paths[1]), "field": "q"},
    ]
    rows = run(target, tmp_path, sources, train=5, heldout=2)
    assert [row["source"] for row in rows if row["split"] == "train"] == ["a.jsonl", "b.jsonl"] * 2 + ["a.jsonl"]
    summary = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert summary["counts"] == {"a.jsonl": {"heldout": 1, "train": 3}, "b.jsonl": {"heldout": 1, "train": 2}}
    assert summary["prompt_tokens"]["train"]["min"] > 0


def test_rows_keep_their_labels_beside_the_same_prompts(target: Path, tmp_path: Path) -> None:
    written = [
        {**row, "language": ("de", "en")[index % 2], "thinking": index < 3, "user": index, "tags": ["a"]}
        for index, row in enumerate(of_classes("Question", 4, 2))
    ]
    bare = {key: value for key, value in written[0].items() if key != "language"}
    path = write(tmp_path / "a.jsonl", [bare, *written[1:]])
    plain = run(target, tmp_path / "plain", path, train=4, heldout=2)
    rows = run(target, tmp_path / "labelled", path, train=4, heldout=2, slices=["language", "thinking"])
    out = tmp_path / "labelled" / "out"
    assert rows == plain
    assert (out / "prompts.parquet").read_bytes() == (tmp_path / "plain" / "out" / "prompts.parquet").read_bytes()
    assert not (tmp_path / "plain" / "out" / "labels.parquet").exists()
    expected = {
        row["prompt"]: ("a.jsonl", *((f"language:{row['language']}",) * (row is not written[0])), f"thinking:{text}")
        for row in written
        for text in [str(row["thinking"]).lower()]
    }
    labels = prompt_labels(out, [row["prompt_id"] for row in rows])
    assert {row["messages"][0]["content"]: each for row, each in zip(rows, labels, strict=True)} == expected
    slices = json.loads((out / "prompts.json").read_text())["slices"]
    assert sum(slices["thinking:true"].values()) == 3 and sum(slices["language:de"].values()) == 2
    assert "no selected prompt has a field tags" in error(
        target, tmp_path / "1", path, train=4, heldout=2, slices=["tags"]
    )


def test_a_field_with_too_many_values_makes_no_slices(target: Path, tmp_path: Path) -> None:
    rows = [{**row, "user": index} for index, row in enumerate(of_classes("Question", 60, 1))]
    text = error(target, tmp_path, write(tmp_path / "a.jsonl", rows), train=60, heldout=1, slices=["user"])
    assert text.startswith("prompts.slices: user has 61 values")


def test_prompts_do_not_depend_on_the_seed_of_the_run(target: Path, tmp_path: Path) -> None:
    path = questions(tmp_path / "a.jsonl", 40)
    sources: list[Row] = [
        {"kind": "jsonl", "path": str(path)},
        {"kind": "reasoning_gym", "tasks": ["chain_sum", "coin_flip"]},
    ]
    settings: dict[str, Any] = {"train": 12, "validation": 3, "heldout": 6}
    first = run(target, tmp_path / "1", sources, run_seed=0, **settings)
    again = run(target, tmp_path / "2", sources, run_seed=5, **settings)
    assert first == again
    of_file = [row["messages"][0]["content"] for row in first if row["source"] == "a.jsonl" and row["split"] == "train"]
    assert of_file != sorted(of_file, key=lambda text: int(text[len("Question number ") : -1])), "shuffled"
    for name in ("prompts.parquet", "prompts.json"):
        assert (tmp_path / "1" / "out" / name).read_bytes() == (tmp_path / "2" / "out" / name).read_bytes()
    other = run(target, tmp_path / "3", sources, **{**settings, "seed": 1})
    assert texts(other, "train") != texts(first, "train")


def test_more_training_prompts_leave_the_other_splits_unchanged(target: Path, tmp_path: Path) -> None:
    sources: list[Row] = [{"kind": "reasoning_gym", "tasks": ["chain_sum"]}]
    few = run(target, tmp_path / "1", sources, train=4, validation=3, heldout=5)
    many = run(target, tmp_path / "2", sources, train=20, validation=3, heldout=5)
    for split in ("heldout", "validation"):
        assert texts(few, split) == texts(many, split)
    assert texts(few, "train") < texts(many, "train")


def test_a_long_prompt_is_an_error_or_skipped(target: Path, tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": f"Short {index}"} for index in range(5)]
    path = write(tmp_path / "a.jsonl", [*rows, {"prompt": "word " * 300}])
    text = error(target, tmp_path, path, train=0, heldout=6, heldout_share=1, max_prompt_tokens=100)
    assert f"{path}, row 6: " in text
    assert "prompts.max_prompt_tokens 100" in text
    assert "too_long: skip" in text
    settings: Row = {"max_prompt_tokens": 100, "too_long": "skip", "heldout_share": 1, "train": 0}
    kept, context = run_with_context(target, tmp_path / "2", path, heldout=5, **settings)
    assert len(kept) == 5
    assert max(len(row["token_ids"]) for row in kept) <= 100
    assert "1 too long" in error(target, tmp_path / "3", path, heldout=6, **settings)
    assert context.summaries["too_long_skipped"] <= 1


def test_preflight_finds_too_long_prompts(target: Path, tmp_path: Path) -> None:
    def check(**settings: Any) -> None:
        source = {"kind": "jsonl", "path": str(tmp_path / "a.jsonl")}
        config = PromptsConfig.model_validate({"sources": [source], "train": 1, "heldout": 1, **settings})
        assert STAGE.preflight is not None
        STAGE.preflight(config, target)

    questions(tmp_path / "a.jsonl", 3)
    check()
    with pytest.raises(DraftsmithError, match="max_prompt_tokens 1024"):
        check(max_prompt_tokens=1024)


def test_a_target_without_template_gets_plain_text_and_a_warning(
    with_template: Callable[[str], Path], tmp_path: Path
) -> None:
    plain = with_template("")
    path = write(tmp_path / "a.jsonl", [{"prompt": "Tell a story"}])
    (row,), context = run_with_context(plain, tmp_path, path, train=1, heldout=0)
    assert load_tokenizer(model_path(plain)).decode(row["token_ids"]) == "Tell a story"
    assert "no chat template" in context.logs[0]


def test_template_arguments_are_passed_and_an_error_of_the_template_names_the_row(
    with_template: Callable[[str], Path], tmp_path: Path
) -> None:
    target = with_template("{% if enable_thinking %}T{% else %}{{ raise_exception('no system prompts') }}{% endif %}")
    path = write(tmp_path / "a.jsonl", [{"prompt": "x"}])
    only: Row = {"train": 0, "heldout": 1, "heldout_share": 1}
    (row,) = run(target, tmp_path / "1", path, **only, chat_template_kwargs={"enable_thinking": True})
    assert len(row["token_ids"]) == 1
    text = error(target, tmp_path / "2", path, **only)
    assert "row 1" in text and "no system prompts" in text


def test_sources_with_counts_are_mixed_evenly(target: Path, tmp_path: Path) -> None:
    few = write(tmp_path / "few.jsonl", [{"prompt": f"few {i}"} for i in range(20)])
    many = write(tmp_path / "many.jsonl", [{"prompt": f"many {i}"} for i in range(40)])
    sources = [
        {"kind": "jsonl", "path": str(few), "counts": {"train": 4, "heldout": 2}},
        {"kind": "jsonl", "path": str(many), "label": "lots", "counts": {"train": 12, "validation": 3}},
    ]
    rows = run(target, tmp_path, sources, train=None, heldout=None)
    selected = [(row["split"], row["source"]) for row in rows]
    assert selected.count(("train", "few.jsonl")) == 4 and selected.count(("train", "lots")) == 12
    assert selected.count(("heldout", "few.jsonl")) == 2 and selected.count(("validation", "lots")) == 3
    train = [source for split, source in selected if split == "train"]
    assert all(train[start : start + 4].count("few.jsonl") == 1 for start in range(0, 16, 4))  # in every quarter


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train": 1}, "heldout is required"),
        ({"train": 1, "sources": [{"counts": {"train": 1}}]}, "Remove train"),
        ({"sources": [{"counts": {"train": 1}}, {}]}, "sources 1 have no counts"),
    ],
)
def test_counts_are_given_by_the_section_or_by_all_sources(fields: Row, message: str) -> None:
    sources = [{"kind": "jsonl", "path": "a.jsonl", **source} for source in fields.get("sources", [{}])]
    with pytest.raises(ValidationError, match=message):
        PromptsConfig.model_validate({**fields, "sources": sources})


@pytest.mark.parametrize("train", [0, 2])
def test_progress_is_reported_before_the_first_prompt_is_selected(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, train: int
) -> None:
    monkeypatch.setattr(row_files, "_REPORT_EVERY_S", 0.0)
    source = {"kind": "jsonl", "path": str(write(tmp_path / "rows.jsonl", of_classes("What is", 50, 5)))}
    config = PromptsConfig.model_validate({"sources": [source], "train": train, "heldout": 2})
    context = StoppingContext.under(tmp_path, {"target": target}, stop_after=0)
    with pytest.raises(StageInterrupted):
        STAGE.run(context, config)
    assert context.progressed == [(0, train + 2, "prompts")], "of the first row"
