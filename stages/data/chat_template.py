"""The target's chat template: from messages to token ids, and back if it can be inverted."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

import numpy as np
from jinja2 import TemplateError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.row_formats import Message, TemplateKwargs

_SYSTEM, _FIRST, _ANSWER, _SECOND = "<<a system prompt>>", "<<first question>>", "<<an answer>>", "<<second question>>"
_TURNS: list[Message] = [
    {"role": "user", "content": _FIRST},
    {"role": "assistant", "content": _ANSWER},
    {"role": "user", "content": _SECOND},
]
# a request may set these, and they change how a template ends the prompt
SWITCHES = [{name: value} for name in ("thinking", "enable_thinking") for value in (True, False)]


@dataclass(frozen=True)
class PromptCandidate:
    """A prompt before the chat template. `where` names it in errors: file and row, or task and item."""

    source: str
    messages: list[Message]
    where: str
    identity: bytes = b""  # `held_out.prompt_identity`, which decides its held-out class; not set by logs
    token_ids: list[int] | None = None  # of a row that has them
    labels: tuple[str, ...] = ()  # `row_formats.row_labels`
    questions: tuple[str, ...] = ()  # `row_formats.later_questions`

    @property
    def text_hash(self) -> str:
        """Return 16 digits that equal prompts share: of the sha256 of roles and texts, ignoring white space."""
        plain = [(message["role"], " ".join(message["content"].split())) for message in self.messages]
        return hashlib.sha256(json.dumps(plain, ensure_ascii=False).encode()).hexdigest()[:16]


def render_prompt(tokenizer: Any, messages: list[Message], where: str, template_kwargs: TemplateKwargs) -> str:
    """Return the text of messages with the generation prompt.

    where: names the messages in the error. Raises DraftsmithError if the template refuses them.
    """
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True, **template_kwargs
        )
    except (TemplateError, TypeError, ValueError, KeyError) as error:
        raise DraftsmithError(f"{where}: the target's chat template refuses it ({error}). Change the row.") from error
    return text


def token_ids(tokenizer: Any, messages: list[Message], where: str, template_kwargs: TemplateKwargs) -> list[int]:
    """Return the token ids up to the beginning of the answer; without a chat template, those of plain text.

    where: same as in `render_prompt`, which raises DraftsmithError.
    """
    if not tokenizer.chat_template:
        return list(tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"])
    text = render_prompt(tokenizer, messages, where, template_kwargs)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def text_after_answer(tokenizer: Any, template_kwargs: TemplateKwargs) -> str:
    """Return the text that the template puts after an answer; empty if it refuses the conversation."""
    with suppress(DraftsmithError):
        return render_prompt(tokenizer, _TURNS[:2], "chat template", template_kwargs).partition(_ANSWER)[2]
    return ""


class TemplateInverter:
    """Splits a decoded prompt at the text that the template puts around the turns of a user and an assistant.

    A log that has only token ids has no messages, but its prompts must still be recognised as held out. Text before the
    first turn (a system prompt, a date) is dropped, as in the hash. So is the generation prompt after the last turn,
    which may differ from the text before an answer in a conversation. If the template cannot be inverted (tool turns, a
    system prompt inside the user's turn), the decoded text is one message: it has the same class in every refresh, but
    not always the class that the same prompt has as messages.
    """

    def __init__(self, tokenizer: Any, template_kwargs: TemplateKwargs):
        self._tokenizer = tokenizer
        self._open = self._answer = self._next = ""
        self._ends: list[str] = []  # possible texts after the last turn, longest first
        if not tokenizer.chat_template:
            return

        def text(messages: list[Message], **switch: bool) -> str:
            return render_prompt(tokenizer, messages, "chat template", template_kwargs | switch)

        try:
            before, rest = text(_TURNS).split(_FIRST)
            self._answer, rest = rest.split(_ANSWER)
            self._next, end = rest.split(_SECOND)
        except (DraftsmithError, ValueError):  # it refuses the conversation, or drops turns
            return
        self._open = commonprefix([before[::-1], self._next[::-1]])[::-1]  # noqa: RUF071 (of texts)
        with suppress(DraftsmithError, ValueError):
            system = text([{"role": "system", "content": _SYSTEM}, *_TURNS])
            _, after = system.partition(_FIRST)[0].split(_SYSTEM)
            if after.strip() and self._open.endswith(after):  # the text before it is there only without a system prompt
                self._open = after
        ends = {end}
        for switch in SWITCHES:
            with suppress(DraftsmithError):
                ends.add(text(_TURNS, **switch).rpartition(_SECOND)[2])
        self._ends = sorted(ends, key=len, reverse=True)

    def messages(self, ids: Sequence[int] | np.ndarray) -> list[Message]:
        """Return the messages of a prompt; one user message with all its text if the template cannot be inverted."""
        text = str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        _, opening, body = text.partition(self._open) if self._open else ("", "", "")
        if not opening or not self._answer:
            return [{"role": "user", "content": text}]
        body = body.removesuffix(next((end for end in self._ends if body.endswith(end)), ""))
        pieces = re.split(f"({re.escape(self._answer)}|{re.escape(self._next)})", body)
        turns = [{"role": "user", "content": pieces[0]}]
        for mark, content in zip(pieces[1::2], pieces[2::2], strict=True):
            turns.append({"role": "assistant" if mark == self._answer else "user", "content": content})
        while turns[-1]["role"] == "assistant":  # dropped, same as in `row_messages`
            turns.pop()
        return turns
