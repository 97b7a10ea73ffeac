"""A prompt's messages from its token ids, where the chat template can be read backwards."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.prompting.rows import Message
from draftsmith.stages.prompting.sources import Candidate
from draftsmith.stages.prompting.template import rendered

_SYSTEM, _FIRST, _ANSWER, _SECOND = "<<a system prompt>>", "<<first question>>", "<<an answer>>", "<<second question>>"
_TURNS: list[Message] = [
    {"role": "user", "content": _FIRST},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": _SECOND},
]
# a request may set these as it likes, and templates end the prompt by them
_SWITCHES = [{name: value} for name in ("thinking", "enable_thinking") for value in (True, False)]


class Unrendered:
    """Splits a decoded prompt at what the template puts around the turns of a user and an assistant.

    A log of token ids alone has no messages, and its prompts must still be recognised as those that were measured on.
    What stands before the first turn (a system prompt, a date) is left out, as in the hash, and so is the generation
    prompt behind the last one, which need not be what stands before an answer in a conversation. Where the template
    cannot be read so (turns of tools, one that puts the system prompt into the user's turn), the decoded text is one
    message: it still falls into one class in every refresh, but not into that of the same prompt as messages.
    """

    def __init__(self, tokenizer: Any, template_kwargs: dict[str, Any]):
        self._tokenizer = tokenizer
        self._open = self._answer = self._next = ""
        self._ends: list[str] = []  # what may stand behind the last turn, longest first
        if not tokenizer.chat_template:
            return

        def text(messages: list[Message], **switch: bool) -> str:
            return rendered(tokenizer, Candidate("", messages, "chat template"), template_kwargs | switch)

        try:
            before, rest = text(_TURNS).split(_FIRST)
            self._answer, rest = rest.split(_ANSWER)
            self._next, end = rest.split(_SECOND)
        except (DraftsmithError, ValueError):  # it refuses such a conversation, or leaves parts of it out
            return
        self._open = _common_end(before, self._next)
        with suppress(DraftsmithError, ValueError):
            system = text([{"role": "system", "content": _SYSTEM}, *_TURNS])
            _, behind = system.partition(_FIRST)[0].split(_SYSTEM)
            if behind.strip() and self._open.endswith(behind):  # what is before it stands behind no system prompt
                self._open = behind
        ends = {end}
        for switch in _SWITCHES:
            with suppress(DraftsmithError):
                ends.add(text(_TURNS, **switch).rpartition(_SECOND)[2])
        self._ends = sorted(ends, key=len, reverse=True)

    def messages(self, ids: Sequence[int] | np.ndarray) -> list[Message]:
        """Of the prompt with these ids; one of the user with all its text where the template cannot be read."""
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


def _common_end(one: str, other: str) -> str:
    length = 0
    while length < min(len(one), len(other)) and one[-1 - length] == other[-1 - length]:
        length += 1
    return one[len(one) - length :]
