"""The stage `prompts`: every source and row shape, disjoint splits, equal results twice, and clear errors."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.parquet import read_table
from draftsmith.artifacts.schemas import PROMPTS
from draftsmith.stages.prompting.sources import ReasoningGymSource, row_messages, supplies
from draftsmith.stages.prompts import STAGE, PromptsConfig
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.targets.resolve import resolve_target
from tests.testbed.context import RecordingContext

Row = dict[str, Any]


@pytest.fixture(scope="module")
def target(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target artifact."""
    out = tmp_path_factory.mktemp("target")
    resolve_target(TargetConfig(source=str(tiny_target), dtype="float32"), out, lambda _line: None)
    return out


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def questions(path: Path, count: int) -> Path:
    return write_rows(path, [{"prompt": f"Question number {index}?"} for index in range(count)])


def run(target: Path, folder: Path, sources: list[Row] | Path, run_seed: int = 0, **settings: Any) -> list[Row]:
    """The rows that the stage writes; its context's folder is `folder`."""
    rows, _context = run_with_context(target, folder, sources, run_seed, **settings)
    return rows


def run_with_context(
    target: Path, folder: Path, sources: list[Row] | Path, run_seed: int = 0, **settings: Any
) -> tuple[list[Row], RecordingContext]:
    if isinstance(sources, Path):
        sources = [{"kind": "jsonl", "path": str(sources)}]
    config = PromptsConfig.model_validate({"sources": sources, "train": 2, "heldout": 1, **settings})
    context = RecordingContext.under(folder, {"target": target}, run_seed)
    STAGE.run(context, config)
    return read_table(context.out / "prompts.parquet", PROMPTS).to_pylist(), context


def error(target: Path, folder: Path, sources: list[Row] | Path, **settings: Any) -> str:
    with pytest.raises(DraftsmithError) as caught:
        run(target, folder, sources, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert not (folder / "out" / "prompts.parquet").exists()
    return text


def texts(rows: list[Row], split: str) -> set[str]:
    return {json.dumps(row["messages"]) for row in rows if row["split"] == split}


def test_tokens_are_the_chat_template_up_to_the_answer(target: Path, tiny_target: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "Tell a story."}])
    (row,) = run(target, tmp_path, path, train=1, heldout=0, system="Be kind.")
    text = AutoTokenizer.from_pretrained(tiny_target).decode(row["token_ids"])
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nTell a story.<|im_end|>\n<|im_start|>assistant\n"
    )
    assert row["messages"] == [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Tell a story."}]


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": [{"role": "user", "content": "Hi there"}]}, None),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi there"}]}]}, None),
        ({"messages": [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Yes"}]}, None),
        ({"messages": [{"role": "user", "content": "Hi there"}], "completion": "Yes"}, None),
        ({"conversations": [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Yes"}]}, None),
        ({"prompt": "Hi there"}, None),
        ({"prompt": [{"role": "user", "content": "Hi there"}]}, None),
        ({"messages": None, "prompt": "Hi there"}, None),
        ({"question": "Hi there", "answer": "Yes"}, "question"),
        ({"turns": ["Hi there", "And then?"]}, "turns"),
        ({"chat": [{"role": "user", "content": "Hi there"}]}, "chat"),
        ({"prompt": "other", "text": "Hi there"}, "text"),
    ],
)
def test_every_shape_is_read(row: Row, field: str | None) -> None:
    assert row_messages(row, field, "row 1") == [{"role": "user", "content": "Hi there"}]


def test_earlier_turns_and_system_prompts_are_kept() -> None:
    turns = [("system", "S"), ("human", "A"), ("gpt", "B"), ("human", "C"), ("gpt", "D")]
    row = {"conversations": [{"from": role, "value": value} for role, value in turns]}
    roles = [(message["role"], message["content"]) for message in row_messages(row, None, "row 1")]
    assert roles == [("system", "S"), ("user", "A"), ("assistant", "B"), ("user", "C")]


@pytest.mark.parametrize(
    ("row", "field", "said"),
    [
        ({"text": "x"}, None, "it has text: set the source's field"),
        ({}, None, "it has nothing"),
        ({"text": "x"}, "question", "no field question: set field to one of text"),
        ({"prompt": "  "}, None, "prompt is blank"),
        ({"prompt": 3}, None, "prompt is a JSON number"),
        ({"messages": []}, None, "has no user message"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, None, "has no user message"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, None, "messages[0]: role 'wizard'"),
        ({"messages": [{"role": "user", "content": {"a": 1}}]}, None, "messages[0]: content is a JSON object"),
        ({"messages": [["user", "x"]]}, None, "messages[0] is a JSON array"),
        ({"messages": [{"role": "user"}]}, None, "content is a JSON null"),
    ],
)
def test_an_unknown_shape_names_row_and_remedy(row: Row, field: str | None, said: str) -> None:
    with pytest.raises(DraftsmithError) as caught:
        row_messages(row, field, "file.jsonl, row 7")
    assert said in str(caught.value)
    assert str(caught.value).startswith("file.jsonl, row 7")


def test_splits_of_a_file_are_disjoint_and_shuffled(target: Path, tmp_path: Path) -> None:
    path = questions(tmp_path / "a.jsonl", 40)
    rows = run(target, tmp_path, path, train=25, validation=5, heldout=10)
    train, validation, heldout = (texts(rows, split) for split in ("train", "validation", "heldout"))
    assert (len(train), len(validation), len(heldout)) == (25, 5, 10)
    assert len(train | validation | heldout) == 40
    assert len({row["prompt_id"] for row in rows}) == 40
    assert heldout != {json.dumps([{"role": "user", "content": f"Question number {i}?"}]) for i in range(10)}


def test_a_text_that_comes_twice_is_taken_once(target: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"Question  number {index % 10}?" + " " * (index // 10)} for index in range(30)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    other = questions(tmp_path / "b.jsonl", 20)
    sources: list[Row] = [{"kind": "jsonl", "path": str(path)}, {"kind": "jsonl", "path": str(other)}]
    # file a holds 10 different texts and b the same 10 and 10 more
    taken, context = run_with_context(target, tmp_path, sources, train=4, heldout=4)
    plain = {" ".join(row["messages"][-1]["content"].split()) for row in taken}
    assert len(plain) == 8
    assert context.summaries["duplicates_removed"] > 0


def test_sources_take_turns(target: Path, tmp_path: Path) -> None:
    paths = [questions(tmp_path / "a.jsonl", 4), write_rows(tmp_path / "b.jsonl", [{"q": f"B{i}"} for i in range(4)])]
    sources: list[Row] = [
        {"kind": "jsonl", "path": str(paths[0])},
        {"kind": "jsonl", "path": str(paths[1]), "field": "q"},
    ]
    rows = run(target, tmp_path, sources, train=5, heldout=2)
    assert [row["source"] for row in rows if row["split"] == "train"] == ["a.jsonl", "b.jsonl"] * 2 + ["a.jsonl"]
    summary = json.loads((tmp_path / "out" / "prompts.json").read_text())
    assert summary["counts"] == {"a.jsonl": {"heldout": 1, "train": 3}, "b.jsonl": {"heldout": 1, "train": 2}}
    assert summary["prompt_tokens"]["train"]["min"] > 0


def test_the_same_config_gives_the_same_bytes_whatever_the_seed_of_the_run(target: Path, tmp_path: Path) -> None:
    path = questions(tmp_path / "a.jsonl", 40)
    sources: list[Row] = [
        {"kind": "jsonl", "path": str(path)},
        {"kind": "reasoning_gym", "tasks": ["chain_sum", "coin_flip"]},
    ]
    settings: dict[str, Any] = {"train": 12, "validation": 3, "heldout": 6}
    first = run(target, tmp_path / "1", sources, run_seed=0, **settings)
    again = run(target, tmp_path / "2", sources, run_seed=5, **settings)
    assert first == again
    for name in ("prompts.parquet", "prompts.json"):
        assert (tmp_path / "1" / "out" / name).read_bytes() == (tmp_path / "2" / "out" / name).read_bytes()
    other = run(target, tmp_path / "3", sources, **{**settings, "seed": 1})
    assert texts(other, "train") != texts(first, "train")


def test_gzip_and_blank_lines_and_a_byte_order_mark_are_read(target: Path, tmp_path: Path) -> None:
    lines = '\ufeff{"prompt": "A"}\n\n{"prompt": "B"}\n{"prompt": "Ü"}\n'
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines.encode()))
    rows = run(target, tmp_path, path)
    assert {row["messages"][0]["content"] for row in rows} == {"A", "B", "Ü"}


def test_suffix_and_system_of_a_source(target: Path, tmp_path: Path) -> None:
    path = questions(tmp_path / "a.jsonl", 3)
    source = {"kind": "jsonl", "path": str(path), "suffix": " Explain.", "system": "Own."}
    rows = run(target, tmp_path, [source], system="General.")
    for row in rows:
        assert row["messages"][0] == {"role": "system", "content": "Own."}
        assert row["messages"][1]["content"].endswith("? Explain.")
    kept = write_rows(
        tmp_path / "b.jsonl",
        [{"messages": [{"role": "system", "content": "Row."}, {"role": "user", "content": f"{i}"}]} for i in range(3)],
    )
    rows = run(target, tmp_path / "2", kept, system="General.")
    assert {row["messages"][0]["content"] for row in rows} == {"Row."}


def test_reasoning_gym_splits_have_different_prompts(target: Path, tmp_path: Path) -> None:
    sources: list[Row] = [
        {"kind": "reasoning_gym", "tasks": ["gsm_symbolic", "chain_sum"]},
        {"kind": "reasoning_gym", "tasks": ["leg_counting"], "options": {"max_animals": 3}},
    ]
    settings = {"train": 30, "validation": 6, "heldout": 9, "max_prompt_tokens": 900}
    rows, context = run_with_context(target, tmp_path, sources, **settings)
    assert {row["source"] for row in rows} == {"gsm_symbolic", "chain_sum", "leg_counting"}
    assert [row["source"] for row in rows[:3]] == ["gsm_symbolic", "chain_sum", "leg_counting"]
    assert not texts(rows, "train") & (texts(rows, "heldout") | texts(rows, "validation"))
    assert len({row["prompt_id"] for row in rows}) == 45
    assert context.summaries["duplicates_removed"] < 3  # each split has seeds of its own: nothing came up again


def test_a_task_gives_as_many_prompts_as_its_seeds_allow() -> None:
    """Of so many prompts that 20 candidates for each would leave the split's range of seeds."""
    source = ReasoningGymSource(kind="reasoning_gym", tasks=["chain_sum"])
    (supply,) = supplies(source, None, seed=0, limit=3 * 10**6)
    assert supply.next("train") is not None


def test_more_training_prompts_leave_the_others_as_they_are(target: Path, tmp_path: Path) -> None:
    sources: list[Row] = [{"kind": "reasoning_gym", "tasks": ["chain_sum"]}]
    few = run(target, tmp_path / "1", sources, train=4, validation=3, heldout=5)
    many = run(target, tmp_path / "2", sources, train=20, validation=3, heldout=5)
    for split in ("heldout", "validation"):
        assert texts(few, split) == texts(many, split)
    assert texts(few, "train") < texts(many, "train")


def test_a_local_folder_is_a_data_set(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    parquet, jsonl = tmp_path / "parquet", tmp_path / "jsonl"
    parquet.mkdir()
    jsonl.mkdir()
    chats = [[{"role": "user", "content": f"Chat {index}"}] for index in range(6)]
    pq.write_table(pa.table({"messages": chats}), parquet / "train.parquet")
    write_rows(jsonl / "train.jsonl", [{"question": f"Row {index}", "answer": "x"} for index in range(6)])
    sources: list[Row] = [
        {"kind": "huggingface", "id": str(parquet)},
        {"kind": "huggingface", "id": str(jsonl), "field": "question"},
    ]
    rows = run(target, tmp_path, sources, train=8, heldout=4)
    contents = {row["messages"][0]["content"] for row in rows}
    assert contents == {f"Chat {i}" for i in range(6)} | {f"Row {i}" for i in range(6)}
    config = PromptsConfig.model_validate({"sources": sources, "train": 1, "heldout": 1})
    assert config.external_files() == sorted([parquet / "train.parquet", jsonl / "train.jsonl"])
    wrong = [{"kind": "huggingface", "id": str(jsonl), "field": "question", "split": "nights"}]
    assert "nights" in error(target, tmp_path / "wrong", wrong)
    assert "no field text" in (text := error(target, tmp_path / "field", [{**sources[1], "field": "text"}]))
    assert f"{jsonl}, split train, row " in text
    empty = tmp_path / "nothing"
    empty.mkdir()
    assert "no data files" in error(target, tmp_path / "none", [{"kind": "huggingface", "id": str(empty)}]).lower()


def test_an_unreachable_data_set_is_one_clear_error(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = error(target, tmp_path, [{"kind": "huggingface", "id": "draftsmith-tests/no-such-data"}])
    assert "draftsmith-tests/no-such-data" in text
    assert "check the id and the network" in text


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b'{"prompt": "a"}\nplain text\n', "row 2: not JSON"),
        (b'{"prompt": "a"}\n["b"]\n', "row 2: a JSON array, not an object"),
        (b'{"prompt": "a"}\n\n{"other": "b"}\n', "row 3: none of the shapes"),
        (b'{"prompt": "\xff"}\n', "not UTF-8"),
        (b'{"prompt": "a"}\n', "ran out of different prompts in split train"),
        (b'{"prompt": "a"}\n{"prompt": "a"}\n{"prompt": "a"}\n', "2 duplicates"),
    ],
)
def test_a_bad_file_names_row_and_remedy(content: bytes, said: str, target: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    text = error(target, tmp_path, path)
    assert said in text
    assert "bad.jsonl" in text


def test_a_damaged_gzip_is_an_error(target: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"prompt": "abc def"}\n' * 500)[:40])
    assert "damaged or cut off gzip" in error(target, tmp_path, path)
    path.write_bytes(b'{"prompt": "a"}\n')
    assert "damaged or cut off gzip" in error(target, tmp_path, path)


def test_a_long_prompt_is_an_error_or_skipped(target: Path, tmp_path: Path) -> None:
    rows: list[Row] = [{"prompt": f"Short {index}"} for index in range(5)]
    path = write_rows(tmp_path / "a.jsonl", [*rows, {"prompt": "word " * 300}])
    text = error(target, tmp_path, path, train=5, heldout=1, max_prompt_tokens=100)
    assert f"{path}, row 6: " in text
    assert "prompts.max_prompt_tokens 100" in text
    assert "too_long: skip" in text
    settings: Row = {"max_prompt_tokens": 100, "too_long": "skip"}
    kept, context = run_with_context(target, tmp_path / "2", path, train=4, heldout=1, **settings)
    assert len(kept) == 5
    assert max(len(row["token_ids"]) for row in kept) <= 100
    assert "1 too long" in error(target, tmp_path / "3", path, train=5, heldout=1, **settings)
    assert context.summaries["too_long_skipped"] <= 1


def test_preflight_finds_what_is_wrong_before_any_work(target: Path, tmp_path: Path) -> None:
    def check(**settings: Any) -> None:
        source = {"kind": "jsonl", "path": str(tmp_path / "absent.jsonl")}
        config = PromptsConfig.model_validate({"sources": [source], "train": 1, "heldout": 1, **settings})
        assert STAGE.preflight is not None
        STAGE.preflight(config, target)

    with pytest.raises(DraftsmithError, match=r"absent\.jsonl is not an existing file"):
        check()
    questions(tmp_path / "absent.jsonl", 3)
    check()
    with pytest.raises(DraftsmithError, match="max_prompt_tokens 1024 leaves no room in the target's context of 1024"):
        check(max_prompt_tokens=1024)


def test_wrong_tasks_and_options_say_what_to_correct(target: Path, tmp_path: Path) -> None:
    def task(name: str, **options: object) -> list[Row]:
        return [{"kind": "reasoning_gym", "tasks": [name], "options": options}]

    assert "did you mean gsm_symbolic" in error(target, tmp_path, task("gsm_symbolik"))
    assert "task chain_sum" in error(target, tmp_path, task("chain_sum", colour="red"))
    assert "task chain_sum" in error(target, tmp_path, task("chain_sum", min_terms=9, max_terms=2))


def test_a_task_with_few_different_prompts_is_an_error(target: Path, tmp_path: Path) -> None:
    sources: list[Row] = [
        {"kind": "reasoning_gym", "tasks": ["coin_flip"], "options": {"min_trials": 3, "max_trials": 3}}
    ]
    assert "coin_flip ran out of different prompts" in error(target, tmp_path, sources, train=100, heldout=1)


def test_a_target_without_template_gets_plain_text_and_a_warning(tiny_target: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_target, tmp_path / "model"))
    (folder / "chat_template.jinja").unlink()
    plain = tmp_path / "target"
    plain.mkdir()
    resolve_target(TargetConfig(source=str(folder)), plain, lambda _line: None)
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "Tell a story"}])
    (row,), context = run_with_context(plain, tmp_path, path, train=1, heldout=0)
    from transformers import AutoTokenizer

    assert AutoTokenizer.from_pretrained(folder).decode(row["token_ids"]) == "Tell a story"
    assert "no chat template" in context.logs[0]


def test_template_arguments_reach_the_template_and_its_refusal_names_the_row(tiny_target: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_target, tmp_path / "model"))
    (folder / "chat_template.jinja").write_text(
        "{% if enable_thinking %}T{% else %}{{ raise_exception('no system prompts') }}{% endif %}"
    )
    artifact = tmp_path / "target"
    artifact.mkdir()
    resolve_target(TargetConfig(source=str(folder)), artifact, lambda _line: None)
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "x"}])
    (row,) = run(artifact, tmp_path / "1", path, train=1, heldout=0, chat_template_kwargs={"enable_thinking": True})
    assert len(row["token_ids"]) == 1
    text = error(artifact, tmp_path / "2", path, train=1, heldout=0)
    assert "row 1" in text
    assert "no system prompts" in text


@pytest.mark.parametrize(
    "change",
    [
        {"sources": []},
        {"sources": [{"kind": "parquet", "path": "x"}]},
        {"sources": [{"kind": "jsonl", "path": "x", "fields": "y"}]},
        {"sources": [{"kind": "reasoning_gym", "tasks": []}]},
        {"train": -1},
        {"too_long": "truncate"},
        {"max_prompt_tokens": 0},
        {"shuffle": True},
    ],
)
def test_wrong_config_is_refused(change: Row) -> None:
    valid = {"sources": [{"kind": "jsonl", "path": "x"}], "train": 1, "heldout": 1}
    PromptsConfig.model_validate(valid)
    with pytest.raises(ValidationError):
        PromptsConfig.model_validate({**valid, **change})


def test_every_source_gives_its_own_counts_evenly_mixed(target: Path, tmp_path: Path) -> None:
    few = write_rows(tmp_path / "few.jsonl", [{"prompt": f"few {i}"} for i in range(20)])
    many = write_rows(tmp_path / "many.jsonl", [{"prompt": f"many {i}"} for i in range(40)])
    sources = [
        {"kind": "jsonl", "path": str(few), "counts": {"train": 4, "heldout": 2}},
        {"kind": "jsonl", "path": str(many), "label": "lots", "counts": {"train": 12, "validation": 3}},
    ]
    rows = run(target, tmp_path, sources, train=None, heldout=None)
    taken = [(row["split"], row["source"]) for row in rows]
    assert taken.count(("train", "few.jsonl")) == 4 and taken.count(("train", "lots")) == 12
    assert taken.count(("heldout", "few.jsonl")) == 2 and taken.count(("validation", "lots")) == 3
    train = [source for split, source in taken if split == "train"]
    assert all(train[start : start + 4].count("few.jsonl") == 1 for start in range(0, 16, 4))  # in every quarter


def test_a_filter_keeps_rows_by_their_fields(target: Path, tmp_path: Path) -> None:
    rows = [{"problem": f"{kind} {i}", "source": kind, "level": i} for kind in "abc" for i in range(8)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    for source in (
        {"kind": "jsonl", "path": str(path)},
        {"kind": "huggingface", "id": str(dataset_folder(tmp_path, rows))},
    ):
        kept = run(
            target, tmp_path / source["kind"],
            [{**source, "field": "problem", "filter": {"source": ["a", "c"], "level": 3}}], train=1, heldout=1,
        )  # fmt: skip
        assert {row["messages"][0]["content"] for row in kept} == {"a 3", "c 3"}
        for filter, said in (({"sorce": "a"}, "no field sorce to filter by"), ({"source": "z"}, "no row passes")):
            text = error(target, tmp_path / "bad", [{**source, "field": "problem", "filter": filter}])
            assert said in text


def dataset_folder(folder: Path, rows: list[Row]) -> Path:
    path = folder / "dataset"
    path.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path / "train.parquet")
    return path


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"train": 1}, "heldout is required: give it here, or give every source its counts"),
        ({"train": 1, "sources": [{"counts": {"train": 1}}]}, "the sources have counts: leave out train"),
        ({"sources": [{"counts": {"train": 1}}, {}]}, "sources 1 have no counts, others have"),
    ],
)
def test_counts_are_given_in_one_place(fields: Row, said: str) -> None:
    sources = [{"kind": "jsonl", "path": "a.jsonl", **source} for source in fields.get("sources", [{}])]
    with pytest.raises(ValidationError, match=said):
        PromptsConfig.model_validate({**fields, "sources": sources})
