"""The sources of stage `prompts`: files, data sets, tasks; and the prompt of a row, in stage `logs` too.

As text, as token ids with or without messages, with tools or images.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.data import PromptsSummary
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import QUESTIONS
from draftsmith.stages.data.logs.rows import LoggedRow, logged_text
from draftsmith.stages.data.prompts.stage import SPLITS, JsonlSource, PromptsConfig
from draftsmith.stages.data.prompts.streams import open_streams, prompt_rows
from draftsmith.stages.data.row_files import RejectLog, read_rows
from draftsmith.stages.data.row_formats import (
    NOT_TEXT,
    TOOLS,
    RejectedRow,
    first_question,
    later_questions,
    messages_beside_ids,
    prompt_token_ids,
    rename_fields,
    row_messages,
)
from tests.stages.data.prompts_run import Row, error, questions, run, run_with_context, texts
from tests.stages.data.row_files import write


@pytest.mark.parametrize(
    ("row", "field"),
    [
        ({"messages": [{"role": "user", "content": "Hi there"}]}, None),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": t} for t in ("Hi ", "there")]}]},
            None,
        ),
        ({"messages": [{"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Yes"}]}, None),
        ({"messages": [{"role": "user", "content": "Hi there"}], "completion": "Yes"}, None),
        ({"conversations": [{"from": "human", "value": "Hi there"}, {"from": "gpt", "value": "Yes"}]}, None),
        ({"prompt": "Hi there"}, None),
        ({"prompt": [{"role": "user", "content": "Hi there"}]}, None),
        ({"messages": None, "prompt": "Hi there"}, None),
        ({"question": "Hi there", "answer": "Yes"}, "question"),
        ({"turns": ["Hi there", "And then?"]}, "turns"),
        ({"question_id": 81, "category": "writing", "turns": ["Hi there", "And then?"]}, None),
        ({"chat": [{"role": "user", "content": "Hi there"}]}, "chat"),
        ({"prompt": "other", "text": "Hi there"}, "text"),
    ],
)
def test_every_shape_is_read(row: Row, field: str | None) -> None:
    assert row_messages(row, field, "row 1") == [{"role": "user", "content": "Hi there"}]


USER = {"role": "user", "content": "A"}


@pytest.mark.parametrize(
    ("row", "field", "later"),
    [
        ({"question_id": 81, "category": "writing", "turns": ["A", "B", "C"], "reference": []}, None, ("B", "C")),
        ({"prompt": ["A", "B"], "prompt_id": 7, "category": "math"}, None, ("B",)),
        ({"asked": ["A", "B"]}, "asked", ("B",)),
        ({"messages": [USER, {"role": "user", "content": "B"}], "multiturn": True}, None, ("B",)),
        ({"messages": [USER]}, None, ()),
        ({"messages": [USER, USER], "completion": "Yes"}, None, ()),
        ({"messages": [USER, {"role": "assistant", "content": "Yes"}, USER]}, None, ()),
        ({"turns": ["A", 3]}, None, ()),
    ],
)
def test_questions_of_mt_bench_and_speed_bench_follow_each_other(
    row: Row, field: str | None, later: tuple[str, ...]
) -> None:
    assert later_questions(row, field) == later
    if later:
        assert first_question(row, field, "row 1") == [USER]


def test_a_question_that_speed_bench_does_not_ship_is_rejected() -> None:
    masked = {"turns": ["FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH\n\n{question}"]}
    with pytest.raises(RejectedRow):
        first_question(masked, None, "row 1")


def test_further_questions_are_kept_beside_the_prompts(target: Path, tmp_path: Path) -> None:
    rows: list[Row] = [{"turns": [f"Tell story {number}", "And then?"]} for number in range(6)]
    path = write(tmp_path / "a.jsonl", rows)
    sources: list[Row] = [{"kind": "jsonl", "path": str(path), "suffix": " Be brief.", "heldout_share": 1}]
    selected = run(target, tmp_path, sources, train=0, heldout=6)
    stored = read_table(tmp_path / "out" / "questions.parquet", QUESTIONS).to_pylist()
    assert {row["prompt_id"] for row in stored} == {row["prompt_id"] for row in selected}
    assert {tuple(row["questions"]) for row in stored} == {("And then? Be brief.",)}
    assert all(len(row["messages"]) == 1 and row["messages"][0]["content"].endswith("Be brief.") for row in selected)
    assert PromptsSummary.read(tmp_path / "out").conversations == 6


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({"text": "x"}, None, "it has text"),
        ({}, None, "it has nothing"),
        ({"text": "x"}, "question", "no field question"),
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
def test_the_error_for_an_unknown_shape_names_the_row(row: Row, field: str | None, message: str) -> None:
    with pytest.raises(DraftsmithError) as caught:
        row_messages(row, field, "file.jsonl, row 7")
    assert message in str(caught.value)
    assert str(caught.value).startswith("file.jsonl, row 7")


def test_suffix_and_system_prompt_are_added(target: Path, tmp_path: Path) -> None:
    path = questions(tmp_path / "a.jsonl", 20)
    source = {"kind": "jsonl", "path": str(path), "suffix": " Explain."}
    rows = run(target, tmp_path, [source], system="General.", heldout_share=0.5)
    for row in rows:
        assert row["messages"][0] == {"role": "system", "content": "General."}
        assert row["messages"][1]["content"].endswith("? Explain.")
    kept = write(
        tmp_path / "b.jsonl",
        [{"messages": [{"role": "system", "content": "Row."}, {"role": "user", "content": f"{i}"}]} for i in range(20)],
    )
    rows = run(target, tmp_path / "2", kept, system="General.", heldout_share=0.5)
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
    assert context.summaries["duplicates_removed"] < 3  # each split has its own seeds: no prompt is in two


def test_a_task_gives_no_more_prompts_than_its_seeds_allow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if a split needs more than there are before the seeds of the next one."""
    monkeypatch.setattr("draftsmith.stages.data.prompts.streams._SEEDS_PER_SPLIT", 50)
    source = {"kind": "reasoning_gym", "tasks": ["chain_sum"]}
    config = PromptsConfig.model_validate({"sources": [source], "train": 0, "heldout": 1})
    (stream,) = open_streams(config.sources[0], config)
    given = 0
    for split in SPLITS:
        while stream.next(split) is not None:
            given += 1
    assert given > 0 and given + stream.discarded == 50 * len(SPLITS)


def test_a_local_folder_is_read_as_a_data_set(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    parquet, jsonl = tmp_path / "parquet", tmp_path / "jsonl"
    parquet.mkdir()
    jsonl.mkdir()
    chats = [[{"role": "user", "content": f"Chat {index}"}] for index in range(6)]
    pq.write_table(pa.table({"messages": chats}), parquet / "train.parquet")
    write(jsonl / "train.jsonl", [{"question": f"Row {index}", "answer": "x"} for index in range(6)])
    sources: list[Row] = [
        {"kind": "huggingface", "id": str(parquet)},
        {"kind": "huggingface", "id": str(jsonl), "field": "question"},
    ]
    rows = run(target, tmp_path, sources, train=0, heldout=12, heldout_share=1)
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


def test_an_unreachable_data_set_is_an_error(target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    text = error(target, tmp_path, [{"kind": "huggingface", "id": "draftsmith-tests/no-such-data"}])
    assert "draftsmith-tests/no-such-data" in text
    assert "Check the id and the network" in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b'{"prompt": "a"}\n', "ran out of different prompts in split train"),
        (b'{"prompt": "a"}\n{"prompt": "a"}\n{"prompt": "a"}\n', "2 duplicates"),
    ],
)
def test_the_error_for_a_bad_file_names_the_row(content: bytes, message: str, target: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    text = error(target, tmp_path, path, heldout=0)
    assert message in text
    assert "bad.jsonl" in text


def test_wrong_tasks_and_options_are_errors(target: Path, tmp_path: Path) -> None:
    def task(name: str, **options: object) -> list[Row]:
        return [{"kind": "reasoning_gym", "tasks": [name], "options": options}]

    assert "Did you mean gsm_symbolic?" in error(target, tmp_path, task("gsm_symbolik"))
    assert "task chain_sum" in error(target, tmp_path, task("chain_sum", colour="red"))
    assert "task chain_sum" in error(target, tmp_path, task("chain_sum", min_terms=9, max_terms=2))


def test_a_filter_selects_rows_by_their_fields(target: Path, tmp_path: Path) -> None:
    rows = [{"problem": f"{kind} {i}", "source": kind, "level": i} for kind in "abc" for i in range(8)]
    path = write(tmp_path / "rows.jsonl", rows)
    for source in (
        {"kind": "jsonl", "path": str(path)},
        {"kind": "huggingface", "id": str(dataset_folder(tmp_path, rows))},
    ):
        kept = run(
            target, tmp_path / source["kind"],
            [{**source, "field": "problem", "filter": {"source": ["a", "c"], "level": 3}}],
            train=0, heldout=2, heldout_share=1,
        )  # fmt: skip
        assert {row["messages"][0]["content"] for row in kept} == {"a 3", "c 3"}
        for filter, message in (({"sorce": "a"}, "no field sorce to filter by"), ({"source": "z"}, "no row passes")):
            text = error(target, tmp_path / "bad", [{**source, "field": "problem", "filter": filter}])
            assert message in text


def dataset_folder(folder: Path, rows: list[Row]) -> Path:
    path = folder / "dataset"
    path.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path / "train.parquet")
    return path


ASKED = {"role": "user", "content": "Hello"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
RETURNED = {"role": "tool", "content": "7"}
IMAGE = {"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "image_url", "image_url": {}}]}
CHAT = [
    {"role": "system", "content": "Be kind."},
    ASKED,
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Tell a  story."},
]


def test_messages_may_be_json_text() -> None:
    for name in ("messages", "conversations"):
        assert row_messages({name: json.dumps(CHAT)}, None, "row 1") == CHAT
        assert row_messages({name: json.dumps(CHAT)}, name, "row 1") == CHAT
    text = {"role": "user", "content": json.dumps(CHAT)}
    assert row_messages({"prompt": json.dumps(CHAT)}, None, "row 1") == [text], "of a prompt it stays text"
    row = {"messages": json.dumps(CHAT), "completion": "Once.", "tools": "[]"}
    assert logged_text(LoggedRow("log", 1, row)) == (CHAT, "Once.")
    with pytest.raises(DraftsmithError, match="row 1: messages end with an answer"):
        logged_text(LoggedRow("log", 1, row | {"messages": json.dumps(CHAT[:3])}))


@pytest.mark.parametrize("text", ["", '{"role": "user", "content": "Hello"}', "[1]", '["Hello"]', '[{"role": "us'])
@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_what_begins_like_json_but_is_no_list_of_messages_is_an_error(text: str, name: str) -> None:
    with pytest.raises(DraftsmithError, match=f"^row 1: {name} "):
        row_messages({name: text}, None, "row 1")


def test_text_in_place_of_messages_is_one_message_of_the_user_in_prompts_and_logs() -> None:
    for text in ("Hello", '"Hello"', "7"):
        assert row_messages({"messages": text}, None, "row 1") == [{"role": "user", "content": text}]
    row = {"messages": "Hello", "completion": "Yes?"}
    assert logged_text(LoggedRow("log", 1, row)) == ([ASKED], "Yes?")


def test_a_row_of_another_shape_names_the_remedy_of_its_section(tmp_path: Path) -> None:
    """Rows of the logs are read as prompts first."""
    row = {"question": "Hello", "reply": "Yes?"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    source = JsonlSource.model_validate({"path": str(tmp_path / "a.jsonl")})
    errors = {}
    for of_logs in (False, True):
        rejects = RejectLog("max_bad_share", 0)
        with pytest.raises(DraftsmithError) as caught:
            list(prompt_rows(source, read_rows([source.path]), rejects, of_logs=of_logs))
        errors[of_logs] = str(caught.value)
    assert errors[False].endswith("it has question, reply. Set the source's field.")
    with pytest.raises(DraftsmithError) as of_log:
        logged_text(LoggedRow(source.path, 1, row))
    assert errors[True] == str(of_log.value)
    assert errors[True].endswith("it has question, reply. Name its fields in logs.fields, or correct it.")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [ASKED, CALL, RETURNED]}, TOOLS),
        ({"messages": [ASKED, CALL]}, TOOLS),
        ({"messages": json.dumps([ASKED, CALL, RETURNED])}, TOOLS),
        ({"conversations": [{"from": "human", "value": "Hello"}, {"from": "tool", "value": "7"}]}, TOOLS),
        ({"prompt": [ASKED, RETURNED]}, TOOLS),
        ({"messages": [ASKED], "tools": [{"type": "function"}]}, TOOLS),
        ({"prompt": "Hello", "functions": '[{"name": "f"}]'}, TOOLS),
        ({"messages": [IMAGE]}, NOT_TEXT),
        ({"prompt": [IMAGE]}, NOT_TEXT),
    ],
)
def test_rows_with_tools_or_images_are_rejected(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(RejectedRow, match=reason):
        row_messages(row, None, "row 1")
    if "messages" in row:
        with pytest.raises(RejectedRow, match=reason):
            logged_text(LoggedRow("log", 1, row | {"completion": "Yes"}))


def test_empty_tools_and_a_named_field_are_accepted() -> None:
    nothing: Any
    for nothing in (None, [], "[]", "null", ""):
        assert row_messages({"messages": [ASKED], "tools": nothing}, None, "row 1") == [ASKED]
    row = {"question": "Hello", "tools": [{"type": "function"}]}
    assert row_messages(row, "question", "row 1") == [ASKED]


def test_token_ids_are_the_prompt_whatever_text_is_beside_them() -> None:
    for text in ({}, {"messages": CHAT}, {"prompt": "<user>Hello"}, {"conversations": CHAT}):
        assert prompt_token_ids({"prompt_token_ids": [5, 6]} | text, None, "row 1") == [5, 6]
    assert prompt_token_ids({"prompt_token_ids": [5, 6], "question": "Hello"}, "question", "row 1") is None
    with pytest.raises(DraftsmithError, match="row 1: prompt_token_ids is empty"):
        prompt_token_ids({"prompt_token_ids": [], "messages": CHAT}, None, "row 1")


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [*CHAT, {"role": "assistant", "content": "Once."}]}, CHAT),
        ({"messages": json.dumps(CHAT)}, CHAT),
        ({"messages": [ASKED, CALL, RETURNED]}, [ASKED, {"role": "assistant", "content": ""}, RETURNED]),
        ({"prompt": "<user>Hello"}, None),
        ({"messages": "<user>Hello"}, None),
        ({"messages": [{"role": "wizard", "content": "Hello"}]}, None),
        ({"messages": [{"role": "user", "content": "half a pair \ud83d"}]}, None),
        ({}, None),
    ],
)
def test_messages_beside_token_ids_are_read_if_they_can_be(
    row: dict[str, Any], messages: list[dict[str, str]] | None
) -> None:
    assert messages_beside_ids(row) == messages


def test_token_ids_with_images_or_changed_tools_are_rejected() -> None:
    with pytest.raises(RejectedRow, match=NOT_TEXT):
        messages_beside_ids({"messages": [IMAGE]})
    tools: dict[str, Any]
    for tools in ({"tools": [{"type": "function"}]}, {"messages": [ASKED, CALL, RETURNED]}):
        messages_beside_ids(tools)
        with pytest.raises(RejectedRow, match=TOOLS):
            messages_beside_ids(tools, tools=False)


@pytest.mark.parametrize("prompt", ["Tell a story.", json.dumps(CHAT), CHAT, "[not JSON"])
def test_a_renamed_prompt_field_is_read_alike_in_prompts_and_logs(prompt: Any, tmp_path: Path) -> None:
    """Else its held-out class would differ."""
    names = {"messages": "question", "completion": "reply"}
    fields = {"question": prompt, "reply": "Once.", "messages": "of somebody else"}
    (tmp_path / "a.jsonl").write_text(json.dumps(fields) + "\n")
    source = JsonlSource.model_validate({"path": str(tmp_path / "a.jsonl"), "fields": names})
    ((_, candidate),) = prompt_rows(source, read_rows([source.path]), RejectLog("prompts.max_bad_share", 0))
    messages = candidate.messages
    renamed_row = LoggedRow("log", 1, dict(rename_fields(fields, names)))  # type: ignore[arg-type]
    assert logged_text(renamed_row) == (messages, "Once.")
    assert messages[-1]["content"] == (prompt if prompt in ("Tell a story.", "[not JSON") else CHAT[-1]["content"])
