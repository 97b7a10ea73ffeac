"""Reads the prompt of a row, for stages `prompts` and `logs`.

If a row has both token ids and text, the ids are the prompt and its messages decide its held-out class (`held_out.py`).
A row without ids is rejected if its text cannot reproduce the prompt.
"""

from __future__ import annotations

import json
import reprlib
from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.row_files import Fields, json_type

Message: TypeAlias = dict[str, str]  # role, content
FieldValue: TypeAlias = str | int | float | bool
FieldFilter: TypeAlias = dict[str, FieldValue | list[FieldValue]]  # of a config: field -> allowed values
LogField: TypeAlias = Literal[
    "messages", "completion", "prompt_token_ids", "completion_token_ids", "finish_reason", "timestamp",
    "started_at", "ended_at", "duration_s", "server",
]  # fmt: skip
TemplateKwargs: TypeAlias = dict[str, bool | int | float | str | None]  # of the target's chat template
FieldNames: TypeAlias = dict[LogField, str]  # of a config: our name for a field -> its name in the rows

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
}
PROMPT_IDS = "prompt_token_ids"
_CHATS = ("messages", "conversations")  # lists of messages, possibly as JSON text
_TEXTS = (*_CHATS, "prompt", "turns")
_PROMPT_SHAPES = (
    '{"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]}, {"prompt": text or messages} or '
    '{"turns": [text, …]}'
)
LOG_SHAPES = (
    '{"messages": [{"role", "content"}], "completion": text} or '
    '{"prompt_token_ids": [...], "completion_token_ids": [...]}'
)
_MASKED = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE"  # in place of questions that SPEED-Bench may not ship
TOOLS = "tools, which a prompt made of its messages would lack"
NOT_TEXT = "images or other parts of messages that are not text"


class RejectedRow(Exception):
    """Raised for a row that can be read but not used; the message is the reason that is counted."""


def matches_filter(allowed: FieldFilter, row: Fields, where: str) -> bool:
    """Return whether a row passes a filter. Raises DraftsmithError, which names `where`, if it lacks a field of it."""
    for name, values in allowed.items():
        if name not in row:
            known = ", ".join(sorted(row)) or "none"
            raise DraftsmithError(f"{where}: no field {name} to filter by. Correct the filter; fields: {known}.")
        if row[name] not in (values if isinstance(values, list) else [values]):
            return False
    return True


def row_labels(row: Fields, names: Sequence[str]) -> tuple[str, ...]:
    """Return `FIELD:VALUE` for each of these fields that holds a text, number or boolean."""
    values = {name: row.get(name) for name in names}
    return tuple(
        f"{name}:{value if isinstance(value, str) else json.dumps(value)}"
        for name, value in values.items()
        if isinstance(value, str | int | float) and value != ""
    )


def unknown_shape(row: Fields, where: str, *, of_logs: bool) -> DraftsmithError:
    """Return the error for a row with none of the shapes that a source of prompts, or section logs, accepts."""
    known = ", ".join(sorted(name for name, value in row.items() if value is not None)) or "nothing"
    shapes, remedy = _PROMPT_SHAPES, "Set the source's field."
    if of_logs:
        shapes, remedy = LOG_SHAPES, "Name its fields in logs.fields, or correct it."
    return DraftsmithError(f"{where}: none of the shapes {shapes}; it has {known}. {remedy}")


def rename_fields(row: Fields, names: FieldNames) -> Fields:
    """Return the row with our names for its fields; a named field that it lacks is None.

    If `messages` is renamed and holds any text but a list of messages as JSON, it becomes one user message.
    """
    if not names:
        return row
    renamed = dict(row)
    renamed.update((ours, row.get(theirs)) for ours, theirs in names.items())
    if "messages" in names and isinstance(text := renamed["messages"], str):
        try:
            _unpacked(text, "")
        except DraftsmithError:
            renamed["messages"] = [{"role": "user", "content": text}]
    return renamed


def prompt_token_ids(row: Fields, field: str | None, where: str) -> list[int] | None:
    """Return the token ids of a row's prompt, whatever text it also has; None if it has no ids.

    field: the field of the prompt if a config names one; then ids are ignored.
    """
    if field is not None or row.get(PROMPT_IDS) is None:
        return None
    if not (ids := token_ids_field(row, PROMPT_IDS, where)):
        raise DraftsmithError(f"{where}: {PROMPT_IDS} is empty. Remove the row.")
    return ids


def messages_beside_ids(row: Fields, *, tools: bool = True) -> list[Message] | None:
    """Return the messages of a prompt of token ids; None if the row has none that can be read.

    Plain text next to the ids is ignored: it is often the output of the chat template. tools: as in `row_messages`.
    Raises RejectedRow.
    """
    name = next((name for name in _CHATS if row.get(name) is not None and not _is_plain(row[name])), None)
    if name is None:
        if not tools and _calls_tools(row, ()):
            raise RejectedRow(TOOLS)
        return None
    try:
        messages = row_messages(row, name, "", tools=tools)
    except DraftsmithError:  # another shape: the ids can still be used
        return None
    return messages if is_unicode(*(message["content"] for message in messages)) else None


def row_messages(
    row: Fields, field: str | None, where: str, *, tools: bool = False, answered: bool = True, of_logs: bool = False
) -> list[Message]:
    """Return the prompt of a row as messages that end before an answer.

    Answers at the end of a conversation, and a `completion` next to it, are dropped: the target will give its own.
    where: names the row in errors. tools: whether a row that calls tools is read too, without its calls. answered:
    whether it may end with an answer. of_logs: whether the section is logs. Raises RejectedRow for content that text
    cannot hold, DraftsmithError for a row of another shape.
    """
    if field is not None:
        if row.get(field) is None:
            raise DraftsmithError(f"{where}: no field {field}. Set field to one of {', '.join(sorted(row)) or 'none'}.")
        name = field
    else:
        present = [name for name in _TEXTS if row.get(name) is not None]
        if not present:
            raise unknown_shape(row, where, of_logs=of_logs)
        name = present[0]
    value = _unpacked(row[name], f"{where}: {name}") if name in _CHATS else row[name]
    # a field of another name is the prompt as it is, whatever tools the row has
    if not tools and _calls_tools(row if name in _TEXTS else {}, value):
        raise RejectedRow(TOOLS)
    messages = _messages(value, f"{where}: {name}")
    while messages and messages[-1]["role"] == "assistant":
        if not answered:
            raise DraftsmithError(f"{where}: {name} end with an answer. It belongs only in 'completion'.")
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise DraftsmithError(f"{where}: {name} has no user message. Remove the row or add one.")
    return messages


def later_questions(row: Fields, field: str | None) -> tuple[str, ...]:
    """Return the questions after the first one of a row that has only questions; none for any other row.

    Such a row is a list of texts (MT-Bench, SPEED-Bench), or messages of a user without an answer between or next to
    them (SPEED-Bench as its authors prepare it).
    """
    value = next((row[name] for name in ([field] if field else _TEXTS) if row.get(name) is not None), None)
    if not isinstance(value, list) or row.get("completion") is not None:
        return ()
    turns = [
        {"role": "user", "content": entry} if isinstance(entry, str) else entry
        for entry in value
        if not isinstance(entry, dict) or entry.get("role") != "system"
    ]
    user_texts = [turn.get("content") for turn in turns if isinstance(turn, dict) and turn.get("role") == "user"]
    questions = [text for text in user_texts if isinstance(text, str) and text.strip()]
    return tuple(questions[1:]) if len(questions) == len(turns) else ()


def first_question(row: Fields, field: str | None, where: str, *, of_logs: bool = False) -> list[Message]:
    """Return the prompt of a row, without the questions that `later_questions` returns. Raises as `row_messages`."""
    messages = row_messages(row, field, where, of_logs=of_logs)
    if any(_MASKED in message["content"] for message in messages):
        raise RejectedRow("a question that SPEED-Bench does not ship: fill them in with its prepare.py")
    later = len(later_questions(row, field))
    return messages[:-later] if 0 < later < len(messages) else messages


def token_ids_field(row: Fields, name: str, where: str) -> list[int]:
    """Return a field of token ids. Raises DraftsmithError for anything else."""
    value = row.get(name)
    if not isinstance(value, list):
        raise DraftsmithError(f"{where}: {name} must be a list of token ids. Correct the row.")
    if not value or (set(map(type, value)) == {int} and min(value) >= 0):  # fast for thousands of ids
        return value
    for index, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise DraftsmithError(
                f"{where}: {name}[{index}] is {reprlib.repr(token)}, not a token id. Correct the row."
            )
    return value


def is_unicode(*texts: str) -> bool:
    """Return whether a tokenizer accepts the texts: JSON can hold half a surrogate pair (an emoji cut in two)."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _calls_tools(row: Fields, messages: Any) -> bool:
    """Return whether tools were offered, called or answered in a row."""
    return any(_is_given(row.get(name)) for name in ("tools", "functions")) or (
        isinstance(messages, list | tuple)
        and any(
            isinstance(turn, dict) and (_calls(turn) or turn.get("role", turn.get("from")) in ("tool", "function"))
            for turn in messages
        )
    )


def _calls(message: Fields) -> bool:
    return bool(message.get("tool_calls") or message.get("function_call"))


def _is_given(value: Any) -> bool:
    """Return whether a value is neither empty nor the JSON text of an empty one."""
    return bool(value) and not (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def _is_plain(value: Any) -> bool:
    """Return whether a value is text that does not begin like JSON."""
    return isinstance(value, str) and not value.lstrip().startswith(("[", "{"))


def _unpacked(value: Any, where: str) -> Any:
    """Return the messages that an export wrote as JSON text, and plain text as it is: one user message.

    Text that begins like JSON is not plain text: it may be the first part of the messages.
    """
    if not isinstance(value, str) or _is_plain(value):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, list) or not all(isinstance(message, dict) for message in parsed):
        raise DraftsmithError(f"{where} begins like JSON, but is not a list of messages. Write a list of messages.")
    return parsed


def _messages(value: Any, where: str) -> list[Message]:
    if isinstance(value, str):
        if not value.strip():
            raise DraftsmithError(f"{where} is blank. Remove the row.")
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise DraftsmithError(f"{where} is a JSON {json_type(value)}. It must be text or a list of messages.")
    if value and isinstance(value[0], str):  # the turns of a multi-turn question: the first one is the prompt
        return _messages(value[0], where)
    messages = []
    for index, entry in enumerate(value):
        entry_name = f"{where}[{index}]"
        if not isinstance(entry, dict):
            raise DraftsmithError(
                f"{entry_name} is a JSON {json_type(entry)}. It must be a message with role and content."
            )
        role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise DraftsmithError(
                f"{entry_name}: role {reprlib.repr(role)} is not one of {', '.join(_ROLES)}. Correct the row."
            )
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") for part in content):
            if any(part["type"] != "text" for part in content):
                raise RejectedRow(NOT_TEXT)
            texts = [part.get("text", "") for part in content]
            content = "".join(texts) if all(isinstance(text, str) for text in texts) else content
        if content is None and _calls(entry):
            content = ""
        if not isinstance(content, str):
            raise DraftsmithError(f"{entry_name}: content is a JSON {json_type(content)}. It must be text.")
        messages.append({"role": _ROLES[role.lower()], "content": content})
    return messages
