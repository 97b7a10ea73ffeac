"""Stage `logs`: reads back the tokens that the target produced; counts and lists every other row."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.stages.data import row_files
from draftsmith.stages.data.logs.filter import SchemaFilter
from draftsmith.stages.data.logs.rows import AnswerReader, LoggedRow
from draftsmith.stages.data.logs.stage import STAGE, LogsConfig
from draftsmith.stages.data.row_files import RejectLog, read_rows
from draftsmith.stages.data.row_formats import TOOLS, RejectedRow
from draftsmith.stages.targets.info import load_tokenizer, model_path, read_target_info
from tests.stages.data.logs.logs_run import Logs, Row, as_ids, counts, set_aside, table
from tests.testbed.context import StoppingContext
from tests.testbed.drafter import DrafterArtifacts


@pytest.fixture(scope="module")
def tokenizer(tiny_drafter: DrafterArtifacts) -> Any:
    return load_tokenizer(model_path(tiny_drafter.target))


@pytest.fixture(scope="module")
def eos(tiny_drafter: DrafterArtifacts) -> int:
    return read_target_info(tiny_drafter.target).eos_ids[0]


def reader_of(made: DrafterArtifacts, tokenizer: Any, eos_ids: list[int]) -> AnswerReader:
    info = read_target_info(made.target).model_copy(update={"vocab_size": len(tokenizer), "eos_ids": eos_ids})
    return AnswerReader(tokenizer, info, LogsConfig(paths=["a"], temperature=0, max_tokens=500))


def as_text(row: Row, tokenizer: Any, eos: int) -> Row:
    """Return the row as a service logs it: text without the stop token, and a finish_reason."""
    stopped = row["finish_reason"] == "stop"
    ids = row["response_ids"][:-1] if stopped else row["response_ids"]
    assert eos not in ids
    return {
        "messages": row["messages"],
        "completion": tokenizer.decode(ids),
        "finish_reason": row["finish_reason"],
        "temperature": 0.0,
    }


def test_text_is_read_as_the_tokens_that_the_target_produced(logs: Logs, tokenizer: Any, eos: int) -> None:
    """Every answer whose text tokenises to its tokens is used, and no other."""
    cut = [row | {"response_ids": row["response_ids"][:20], "finish_reason": "length"} for row in logs.answers[:8]]
    answers = logs.answers[8:] + cut
    logged = [as_text(row, tokenizer, eos) for row in answers]
    ctx = logs.run(logged)
    used = table(ctx)
    left_out = {entry["row"] for entry in set_aside(ctx)}
    kept = [row for number, row in enumerate(answers, 1) if number not in left_out]
    assert len(used) == len(kept) > 40
    assert {"stop", "length"} <= {row["finish_reason"] for row in used}
    for ours, original in zip(used, kept, strict=True):
        assert ours["prompt_ids"] == original["prompt_ids"]
        text = tokenizer.decode(original["response_ids"], skip_special_tokens=True)
        assert tokenizer.decode(ours["response_ids"], skip_special_tokens=True) == text
        assert ours["finish_reason"] == original["finish_reason"]
    assert sum(ours["response_ids"] == original["response_ids"] for ours, original in zip(used, kept, strict=True)) > 40


def test_token_ids_are_used_unchanged(logs: Logs) -> None:
    path = logs.folder / "log.jsonl.gz"
    path.write_bytes(gzip.compress("".join(json.dumps(as_ids(row)) + "\n" for row in logs.answers[:12]).encode()))
    ctx = logs.run(path)
    same = ("prompt_ids", "response_ids", "finish_reason", "temperature", "split")
    assert [[row[name] for name in same] for row in table(ctx)] == [
        [row[name] for name in same] for row in logs.answers[:12]
    ]
    assert len({row["trajectory_id"] for row in table(ctx)}) == 12
    assert counts(ctx)["set_aside"] == {} and set_aside(ctx) == []


def test_rejected_rows_are_counted_and_listed_with_their_reason(logs: Logs, eos: int) -> None:
    good = as_ids(logs.answers[0])
    response = good["completion_token_ids"]
    messages = logs.answers[0]["messages"]
    rows: list[tuple[Row, str | None]] = [
        (good, None),
        (good | {"completion_token_ids": response[:5]}, None),
        (good, "duplicate of an earlier row"),
        (good | {"completion_token_ids": response[:1]}, "answer shorter than two tokens"),
        (good | {"completion_token_ids": []}, "answer shorter than two tokens"),
        (good | {"completion_token_ids": [response[0], eos, response[0]]}, "stop token inside the answer"),
        (good | {"completion_token_ids": [*response[:3], 10**6]}, "token id outside the target's vocabulary"),
        (good | {"completion_token_ids": response[:3] * 200}, "too long"),
        (good | {"prompt_token_ids": []}, "empty prompt"),
        (as_ids(logs.answers[1]) | {"temperature": 0.7}, "another temperature (0.7; logs.temperature is 0)"),
        ({"messages": messages, "completion": ""}, "answer shorter than two tokens"),
        ({"messages": messages, "completion": "cut in two: \ud83d"}, "text is not valid Unicode"),
        ({"messages": [{"role": "user", "content": "\udc00"}], "completion": "yes"}, "text is not valid Unicode"),
        ({"messages": messages, "completion": "yes", "tools": [{"type": "function"}]}, TOOLS),
        (
            {"messages": [*messages, {"role": "assistant", "content": None, "tool_calls": [{}]}], "completion": "yes"},
            TOOLS,
        ),
    ]
    path = logs.write("log.jsonl", [row | {"id": f"r{i}"} for i, (row, _) in enumerate(rows)])
    ctx = logs.run(path, max_tokens=200)
    expected = [
        {"file": str(path), "row": i + 1, "id": f"r{i}", "reason": reason}
        for i, (_, reason) in enumerate(rows)
        if reason
    ]
    assert set_aside(ctx) == expected
    assert [row["trajectory_id"][-2:] for row in table(ctx)] == ["/0", "/1"]  # two answers to one prompt
    found = counts(ctx)
    assert (found["rows_in_files"], found["rows_read"], found["used"]) == (len(rows), len(rows), 2)
    assert sum(found["set_aside"].values()) == len(expected)
    assert found["set_aside"]["answer shorter than two tokens"] == 3


def test_a_stopped_answer_ends_with_the_stop_token_of_the_template(logs: Logs, eos: int) -> None:
    """The tokenizer's own eos may only end documents."""
    other = load_tokenizer(model_path(logs.made.target))
    assert other.convert_ids_to_tokens(eos) in other.chat_template
    ends_documents = next(i for i in other.all_special_ids + list(range(len(other))) if i != eos)
    other.eos_token = other.convert_ids_to_tokens(ends_documents)
    reader = reader_of(logs.made, other, [ends_documents, eos])
    row = {"messages": logs.answers[0]["messages"], "completion": "yes, it is", "finish_reason": "stop"}
    assert reader.read(LoggedRow("log", 1, row)).response_ids[-1] == eos
    for fields, ends in (  # a stop string ends an answer for the same reason, and no token follows the text
        ({"stop": []}, True), ({"stop": None, "matched_stop": None}, True),
        ({"stop": ["Q:"], "matched_stop": eos}, True), ({"stop": ["Q:"]}, False),
        ({"stop": "Q:"}, False), ({"matched_stop": "Q:"}, False),
    ):  # fmt: skip
        assert (reader.read(LoggedRow("log", 1, row | fields)).response_ids[-1] == eos) is ends, fields
    other.chat_template = None
    reader = reader_of(logs.made, other, [ends_documents, eos])
    assert reader.stop_id == ends_documents, "nothing else is known"


def test_text_that_the_tokenizer_changes_is_rejected(logs: Logs) -> None:
    """Some tokenizers compose accents: text that was generated decomposed is not restored."""
    from tokenizers.normalizers import NFC

    composing = load_tokenizer(model_path(logs.made.target))
    composing.backend_tokenizer.normalizer = NFC()
    reader = reader_of(logs.made, composing, [2])
    messages = logs.answers[0]["messages"]
    assert reader.read(LoggedRow("log", 1, {"messages": messages, "completion": "caf\u00e9"})).response_ids
    with pytest.raises(RejectedRow, match="does not survive"):
        reader.read(LoggedRow("log", 1, {"messages": messages, "completion": "cafe\u0301"}))


def test_text_whose_boundary_tokenises_differently_is_rejected(logs: Logs, tokenizer: Any) -> None:
    """Without a template a prompt may end inside a word, and is tokenised differently together with the answer."""
    bare = load_tokenizer(model_path(logs.made.target))
    bare.chat_template = None
    reader = reader_of(logs.made, bare, [bare.eos_token_id])
    token = next(  # a token of letters that the tokenizer makes out of two parts
        text
        for text in (tokenizer.decode([i]) for row in logs.answers for i in row["response_ids"])
        if text.isalpha() and len(text) > 3 and len(tokenizer(text, add_special_tokens=False)["input_ids"]) == 1
    )

    def read(prompt: str, completion: str) -> list[int]:
        row = {"messages": [{"role": "user", "content": prompt}], "completion": completion}
        return reader.read(LoggedRow("log", 1, row)).response_ids

    rest = " " + tokenizer.decode(logs.answers[0]["response_ids"][:12], skip_special_tokens=True).strip()
    assert len(read(token, rest)) > 2
    with pytest.raises(RejectedRow, match="tokenised differently together"):
        read(token[:2], token[2:] + rest)


def test_files_are_read_in_order_up_to_the_limit_of_rows(logs: Logs) -> None:
    first = logs.write("a.jsonl", [as_ids(row) for row in logs.answers[:3]])
    second = logs.write("b.jsonl", ["", *[as_ids(row) for row in logs.answers[3:9]]])
    ctx = logs.run(first, second, rows=5)
    assert [row["response_ids"] for row in table(ctx)] == [row["response_ids"] for row in logs.answers[:5]]
    assert LogsConfig(paths="one.jsonl", temperature=0).paths == ["one.jsonl"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{not json", "row 2: not JSON"),
        ({"prompt": "a", "answer": "b"}, r"row 2: none of the shapes .*completion.*; it has answer, prompt"),
        ({"prompt_token_ids": [1, 2]}, "row 2: completion_token_ids must be a list of token ids"),
        ({"prompt_token_ids": [1], "completion_token_ids": [3, -1]}, r"row 2: completion_token_ids\[1\] is -1"),
        ({"prompt_token_ids": [1], "completion_token_ids": [3, 4], "temperature": "hot"}, "row 2: temperature 'hot'"),
        ({"prompt_token_ids": [1], "completion_token_ids": [3, 4], "temperature": 10**400}, "row 2: temperature 1000"),
    ],
)
def test_a_malformed_row_is_an_error_that_names_file_and_row(logs: Logs, row: Row | str, message: str) -> None:
    path = logs.write("log.jsonl", [{"prompt_token_ids": [1], "completion_token_ids": [3, 4]}, row])
    schema_filter = SchemaFilter(LogsConfig(paths=[str(path)], temperature=0), RejectLog("logs.max_bad_share", 0))
    first, second = read_rows([str(path)])
    assert schema_filter.accept(first)
    with pytest.raises(DraftsmithError, match=message) as caught:
        schema_filter.accept(second)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_log_without_a_usable_row_reports_the_reasons(logs: Logs) -> None:
    with pytest.raises(DraftsmithError, match=r"log\.jsonl .*3 another temperature \(1; logs\.temperature is 0\)"):
        logs.run([as_ids(row) | {"temperature": 1.0} for row in logs.answers[:3]])
    with pytest.raises(DraftsmithError, match=r"empty\.jsonl: is empty"):
        logs.run(logs.write("empty.jsonl", []))


def test_preflight_finds_missing_files_and_too_long_contexts(logs: Logs) -> None:
    config = LogsConfig(paths=[str(logs.folder / "none.jsonl")], temperature=0)
    with pytest.raises(DraftsmithError, match=r"logs\.paths: .*none\.jsonl"):
        config.external_files()
    path = logs.write("log.jsonl", [])
    assert STAGE.preflight is not None
    with pytest.raises(DraftsmithError, match=r"logs\.max_tokens"):
        STAGE.preflight(LogsConfig(paths=[str(path)], temperature=0, max_tokens=10**6), logs.made.target)


def test_reading_stops_between_two_rows(logs: Logs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_files, "_REPORT_EVERY_S", 0.0)  # as if every row took a second
    rows: list[Any] = [{"prompt_token_ids": [5, 6, number], "completion_token_ids": [8, 9]} for number in range(20)]
    settings = {"paths": [str(logs.write("log.jsonl", rows))], "temperature": 0, "scored": 0}
    context = StoppingContext.under(logs.folder, {"target": logs.made.target}, stop_after=3, unit="rows")
    with pytest.raises(StageInterrupted):
        STAGE.run(context, LogsConfig.model_validate(settings))
    assert context.progressed[-1] == (3, 3, "rows")
