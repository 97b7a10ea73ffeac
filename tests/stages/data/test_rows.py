"""The prompt of a row: as text, as token ids with or without messages, with tools or images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.held_out import prompt_identity
from draftsmith.stages.data.logs.rows import LoggedRow, logged_text
from draftsmith.stages.data.prompt_streams import prompt_rows
from draftsmith.stages.data.prompts import JsonlSource
from draftsmith.stages.data.row_files import RejectLog, read_rows
from draftsmith.stages.data.row_formats import (
    NOT_TEXT,
    TOOLS,
    RejectedRow,
    is_unicode,
    messages_beside_ids,
    prompt_token_ids,
    rename_fields,
    row_messages,
)

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


@pytest.mark.parametrize(
    ("row", "digest"),
    [
        ({"prompt": "What is 7 times 8?"}, "d4319ca93baf3e7584699e2c842592c2"),
        ({"messages": CHAT, "completion": "Once."}, "d5cd361f2bc12287febd68a10f244d16"),
        (
            {"conversations": [{"from": "human", "value": "Grüße"}, {"from": "gpt", "value": "Yes"}]},
            "e4b04f9e200ebb9bef75bd443ae3bb02",
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": each} for each in ("Hi ", "there")]}]},
            "163ede2c926246488e029c16903edcfe",
        ),
        ({"prompt": '[{"role": "user", "content": "Hi"}]'}, "f28195f87c6c4116c20bf5ec6256d6a0"),
    ],
)
def test_the_identity_of_a_row_never_changes(row: dict[str, Any], digest: str) -> None:
    """Another way to read a row would train on prompts that were held out before."""
    assert prompt_identity(row_messages(row, None, "row 1")).hex() == digest


def test_messages_may_be_json_text() -> None:
    for name in ("messages", "conversations"):
        assert row_messages({name: json.dumps(CHAT)}, None, "row 1") == CHAT
        assert row_messages({name: json.dumps(CHAT)}, name, "row 1") == CHAT
    row = {"messages": json.dumps(CHAT), "completion": "Once.", "tools": "[]"}
    assert logged_text(LoggedRow("log", 1, row)) == (CHAT, "Once.")
    with pytest.raises(DraftsmithError, match="row 1: messages end with an answer"):
        logged_text(LoggedRow("log", 1, row | {"messages": json.dumps(CHAT[:3])}))


@pytest.mark.parametrize("text", ["Hello", "", '"Hello"', '{"role": "user", "content": "Hello"}', "[1]", '["Hello"]'])
@pytest.mark.parametrize("name", ["messages", "conversations"])
def test_other_text_in_place_of_messages_is_an_error(text: str, name: str) -> None:
    with pytest.raises(DraftsmithError, match=f"^row 1: {name} "):
        row_messages({name: text}, None, "row 1")


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


def test_half_a_surrogate_pair_is_not_unicode() -> None:
    assert is_unicode("", "süß", "\U0001f600") and is_unicode()
    assert not is_unicode("süß", "cut in two: \ud83d") and not is_unicode("\udc00")


@pytest.mark.parametrize("prompt", ["Tell a story.", json.dumps(CHAT), CHAT, "[not JSON"])
def test_a_renamed_prompt_field_is_read_alike_in_prompts_and_logs(prompt: Any, tmp_path: Path) -> None:
    """Else its held-out class would differ."""
    names = {"messages": "question", "completion": "reply"}
    fields = {"question": prompt, "reply": "Once.", "messages": "of somebody else"}
    (tmp_path / "a.jsonl").write_text(json.dumps(fields) + "\n")
    source = JsonlSource.model_validate({"path": str(tmp_path / "a.jsonl"), "fields": names})
    ((_, messages, _),) = prompt_rows(source, read_rows([source.path]), RejectLog("prompts.max_bad_share", 0))
    renamed_row = LoggedRow("log", 1, dict(rename_fields(fields, names)))  # type: ignore[arg-type]
    assert logged_text(renamed_row) == (messages, "Once.")
    assert messages[-1]["content"] == (prompt if prompt in ("Tell a story.", "[not JSON") else CHAT[-1]["content"])
