"""The target's chat template: from messages to token ids, and back where it can be read backwards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from os.path import commonprefix
from typing import Any

import numpy as np

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.prompt_config import Candidate
from draftsmith.stages.data.row_formats import Message

_SYSTEM, _FIRST, _ANSWER, _SECOND = "<<a system prompt>>", "<<first question>>", "<<an answer>>", "<<second question>>"
_TURNS: list[Message] = [
    {"role": "user", "content": _FIRST},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": _SECOND},
]
# a request may set these as it likes, and templates end the prompt by them
_SWITCHES = [{name: value} for name in ("thinking", "enable_thinking") for value in (True, False)]


def rendered(tokenizer: Any, messages: list[Message], where: str, template_kwargs: dict[str, Any]) -> str:
    """Return the text of messages with the generation prompt. Raises DraftsmithError if the template refuses them.

    where: names them in the error.
    """
    from jinja2 import TemplateError

    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **template_kwargs
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DraftsmithError(f"{where}: the target's chat template refuses it ({error}): change the row") from error
    return text


def token_ids(tokenizer: Any, candidate: Candidate, template_kwargs: dict[str, Any]) -> list[int]:
    """Return ids up to where the answer begins; without a chat template, those of plain text."""
    if not tokenizer.chat_template:
        text = "\n\n".join(message["content"] for message in candidate.messages)
        return list(tokenizer(text)["input_ids"])
    text = rendered(tokenizer, candidate.messages, candidate.where, template_kwargs)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def text_after_answer(tokenizer: Any, template_kwargs: dict[str, Any]) -> str:
    """Return what the template puts after an answer; empty if it refuses the conversation."""
    with suppress(DraftsmithError):
        return rendered(tokenizer, _TURNS[:2], "chat template", template_kwargs).partition(_ANSWER)[2]
    return ""


class TemplateInverter:
    """Splits a decoded prompt at what the template puts around the turns of a user and an assistant.

    A log of token ids alone has no messages, and its prompts must still be recognised as those that were measured on.
    What stands before the first turn (a system prompt, a date) is left out, as in the hash, and so is the generation
    prompt after the last one, which need not be what stands before an answer in a conversation. Where the template
    cannot be read so (turns of tools, one that puts the system prompt into the user's turn), the decoded text is one
    message: it still falls into one class in every refresh, but not into that of the same prompt as messages.
    """

    def __init__(self, tokenizer: Any, template_kwargs: dict[str, Any]):
        self._tokenizer = tokenizer
        self._open = self._answer = self._next = ""
        self._ends: list[str] = []  # what may stand after the last turn, longest first
        if not tokenizer.chat_template:
            return

        def text(messages: list[Message], **switch: bool) -> str:
            return rendered(tokenizer, messages, "chat template", template_kwargs | switch)

        try:
            before, rest = text(_TURNS).split(_FIRST)
            self._answer, rest = rest.split(_ANSWER)
            self._next, end = rest.split(_SECOND)
        except (DraftsmithError, ValueError):  # it refuses such a conversation, or leaves parts of it out
            return
        self._open = commonprefix([before[::-1], self._next[::-1]])[::-1]  # noqa: RUF071 (of texts)
        with suppress(DraftsmithError, ValueError):
            system = text([{"role": "system", "content": _SYSTEM}, *_TURNS])
            _, after = system.partition(_FIRST)[0].split(_SYSTEM)
            if after.strip() and self._open.endswith(after):  # what is before it stands after no system prompt
                self._open = after
        ends = {end}
        for switch in _SWITCHES:
            with suppress(DraftsmithError):
                ends.add(text(_TURNS, **switch).rpartition(_SECOND)[2])
        self._ends = sorted(ends, key=len, reverse=True)

    def messages(self, ids: Sequence[int] | np.ndarray) -> list[Message]:
        """Return the messages of a prompt; one of the user with all its text where the template cannot be read."""
        text = str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        _, found, body = text.partition(self._open) if self._open else ("", "", "")
        if not found or not self._answer:
            return [{"role": "user", "content": text}]
        body = body.removesuffix(next((end for end in self._ends if body.endswith(end)), ""))
        parts = re.split(f"({re.escape(self._answer)}|{re.escape(self._next)})", body)
        turns = [{"role": "user", "content": parts[0]}]
        for mark, content in zip(parts[1::2], parts[2::2], strict=True):
            turns.append({"role": "assistant" if mark == self._answer else "user", "content": content})
        while turns[-1]["role"] == "assistant":  # answers at the end, as in `row_messages`, or the beginning of one
            turns.pop()
        return turns
