"""The shapes in which a row holds a prompt.

Both stages that read rows, `prompts` and `logs`, read a prompt here: of token ids and text in one row the ids are the
prompt and its messages say whose class it is (`held_out.py`), and what text alone cannot ask again is set aside.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.row_files import kind_of

Message: TypeAlias = dict[str, str]  # role, content
Value: TypeAlias = str | int | float | bool
Filter: TypeAlias = dict[str, Value | list[Value]]  # of a config: field -> what it may be
LogField: TypeAlias = Literal[
    "messages", "completion", "prompt_token_ids", "completion_token_ids", "finish_reason", "timestamp"
]
FieldNames: TypeAlias = dict[LogField, str]  # of a config: our name of a field -> its name in the rows

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
_CHATS = ("messages", "conversations")  # lists of messages, maybe as JSON text
_TEXTS = (*_CHATS, "prompt")
_SHAPES = '{"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]} or {"prompt": text or messages}'
TOOLS = "tools, which a prompt made of its messages would lack"
NOT_TEXT = "images or other parts of messages that are not text"


class SetAside(Exception):
    """This row can be read, but not used; the message is the reason, as it is counted."""


def passes(wanted: Filter, row: Mapping[str, Any], where: str) -> bool:
    """Whether a filter lets the row through; `where` names the row in the error for a field that it lacks."""
    for name, values in wanted.items():
        if name not in row:
            known = ", ".join(sorted(row)) or "none"
            raise DraftsmithError(f"{where}: no field {name} to filter by: correct filter, its fields are {known}")
        if row[name] not in (values if isinstance(values, list) else [values]):
            return False
    return True


def renamed(row: Mapping[str, Any], names: FieldNames) -> Mapping[str, Any]:
    """Return the row with our names for the fields that `names` gives; a field that it lacks is None.

    Under another name `messages` may be plain text too: then it is the one message of a user.
    """
    if not names:
        return row
    made: dict[str, Any] = dict(row)
    made.update((ours, row.get(theirs)) for ours, theirs in names.items())
    if "messages" in names and isinstance(text := made["messages"], str):
        try:
            _unpacked(text, "")
        except DraftsmithError:
            made["messages"] = [{"role": "user", "content": text}]
    return made


def prompt_ids(row: Mapping[str, Any], field: str | None, where: str) -> list[int] | None:
    """The prompt of a row that has it as token ids, as logs may, whatever text is beside them; else None.

    field: the one that a config names in place of all these.
    """
    if field is not None or row.get(PROMPT_IDS) is None:
        return None
    if not (ids := row_ids(row, PROMPT_IDS, where)):
        raise DraftsmithError(f"{where}: {PROMPT_IDS} is empty: remove the row")
    return ids


def messages_beside_ids(row: Mapping[str, Any], *, tools: bool = True) -> list[Message] | None:
    """The prompt of a row of token ids as messages; None where the ids alone say it. A `prompt` beside them does not
    count: it is often what the chat template has made already.

    tools: as in `row_messages`. Raises SetAside.
    """
    name = next((name for name in _CHATS if row.get(name) is not None), None)
    if name is None:
        if not tools and _calls_tools(row, ()):
            raise SetAside(TOOLS)
        return None
    try:
        messages = row_messages(row, name, "", tools=tools)
    except DraftsmithError:  # not in our words: the ids are readable all the same
        return None
    return messages if is_unicode(*(message["content"] for message in messages)) else None


def row_messages(
    row: Mapping[str, Any], field: str | None, where: str, *, tools: bool = False, answered: bool = True
) -> list[Message]:
    """The prompt of a row as messages that end before an answer; `where` names the row in errors.

    Answers at the end of a conversation (and a `completion` beside it) are left out: the target will give its own.
    tools: whether a row that calls tools is read too, without its calls. answered: whether it may end with an answer.
    Raises SetAside for what messages of text do not hold, DraftsmithError for a row of another shape.
    """
    if field is not None:
        if row.get(field) is None:
            raise DraftsmithError(f"{where}: no field {field}: set field to one of {', '.join(sorted(row)) or 'none'}")
        name = field
    else:
        found = [name for name in _TEXTS if row.get(name) is not None]
        if not found:
            known = ", ".join(sorted(row)) or "nothing"
            raise DraftsmithError(f"{where}: none of the shapes {_SHAPES}; it has {known}: set the source's field")
        name = found[0]
    value = _unpacked(row[name], f"{where}: {name}") if name in _CHATS else row[name]
    # a field of another name is asked as it is, whatever tools stand beside it
    if not tools and _calls_tools(row if name in _TEXTS else {}, value):
        raise SetAside(TOOLS)
    messages = _messages(value, f"{where}: {name}")
    while messages and messages[-1]["role"] == "assistant":
        if not answered:
            raise DraftsmithError(f"{where}: {name} end with an answer: it belongs into 'completion' alone")
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise DraftsmithError(f"{where}: {name} has no user message: remove the row or add one")
    return messages


def row_ids(row: Mapping[str, Any], name: str, where: str) -> list[int]:
    """A field of token ids. Raises DraftsmithError for anything else."""
    value = row.get(name)
    if not isinstance(value, list):
        raise DraftsmithError(f"{where}: {name} must be a list of token ids: correct the row")
    if not value or (set(map(type, value)) == {int} and min(value) >= 0):  # of thousands: without a loop here
        return value
    for index, token in enumerate(value):
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise DraftsmithError(f"{where}: {name}[{index}] is {token!r}, not a token id: correct the row")
    return value


def is_unicode(*texts: str) -> bool:
    """Half a surrogate pair, which JSON can hold (an emoji cut in two), is no text that a tokenizer takes."""
    try:
        for text in texts:
            text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _calls_tools(row: Mapping[str, Any], messages: Any) -> bool:
    """The target was told of tools, called one, or read what it returned."""
    return any(_given(row.get(name)) for name in ("tools", "functions")) or (
        isinstance(messages, list | tuple)
        and any(
            isinstance(each, dict) and (_calls(each) or each.get("role", each.get("from")) in ("tool", "function"))
            for each in messages
        )
    )


def _calls(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls") or message.get("function_call"))


def _given(value: Any) -> bool:
    """Is it more than nothing? A column of JSON text says so as text."""
    return bool(value) and not (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def _unpacked(value: Any, where: str) -> Any:
    """Messages that an export has written as JSON text; other text there would be taken for a user's words."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, list) or not all(isinstance(each, dict) for each in parsed):
        raise DraftsmithError(f"{where} is text, but no JSON list of messages: give a list, or text in `prompt`")
    return parsed


def _messages(value: Any, where: str) -> list[Message]:
    if isinstance(value, str):
        if not value.strip():
            raise DraftsmithError(f"{where} is blank: remove the row")
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise DraftsmithError(f"{where} is a JSON {kind_of(value)}: it must be text or a list of messages")
    if value and isinstance(value[0], str):  # the turns of a multi-turn question: its first one is a prompt
        return _messages(value[0], where)
    messages = []
    for index, entry in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(entry, dict):
            raise DraftsmithError(f"{place} is a JSON {kind_of(entry)}: it must be a message with role and content")
        role, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise DraftsmithError(f"{place}: role {role!r} is not one of {', '.join(_ROLES)}: correct the row")
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") for part in content):
            if any(part["type"] != "text" for part in content):
                raise SetAside(NOT_TEXT)
            content = "".join(str(part.get("text", "")) for part in content)
        if content is None and _calls(entry):
            content = ""
        if not isinstance(content, str):
            raise DraftsmithError(f"{place}: content is a JSON {kind_of(content)}: it must be text")
        messages.append({"role": _ROLES[role.lower()], "content": content})
    return messages
