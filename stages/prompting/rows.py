"""The shapes in which a row holds a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.prompting.files import kind_of

Message: TypeAlias = dict[str, str]  # role, content

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
_TEXTS = ("messages", "conversations", "prompt")
_SHAPES = '{"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]} or {"prompt": text or messages}'


def prompt_ids(row: Mapping[str, Any], field: str | None, where: str) -> list[int] | None:
    """The prompt of a row that has it as token ids alone, as logs may; None for one of text."""
    if field is not None or row.get(PROMPT_IDS) is None or any(row.get(name) is not None for name in _TEXTS):
        return None
    if not (ids := row_ids(row, PROMPT_IDS, where)):
        raise DraftsmithError(f"{where}: {PROMPT_IDS} is empty: remove the row")
    return ids


def row_messages(row: Mapping[str, Any], field: str | None, where: str) -> list[Message]:
    """The prompt of a row as messages that end before an answer; `where` names the row in errors.

    Answers at the end of a conversation (and a `completion` beside it) are left out: the target will give its own.
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
    messages = _messages(row[name], f"{where}: {name}")
    while messages and messages[-1]["role"] == "assistant":
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
    return not any("\ud800" <= character <= "\udfff" for text in texts for character in text)


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
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(content, str):
            raise DraftsmithError(f"{place}: content is a JSON {kind_of(content)}: it must be text")
        messages.append({"role": _ROLES[role.lower()], "content": content})
    return messages
