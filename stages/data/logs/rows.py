"""Reads the rows of a production service's log as token ids of the target, or rejects them with a reason.

Exact replay needs the very tokens that the target produced. A row with token ids has them. A row of text has them only
if tokenising it again gives the same text and the same boundary between prompt and answer; otherwise it is rejected.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.redaction import MAX_SHOWN
from draftsmith.stages.data.chat_template import text_after_answer, token_ids
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.data.row_files import Row
from draftsmith.stages.data.row_formats import (
    PROMPT_IDS,
    Message,
    RejectedRow,
    is_unicode,
    messages_beside_ids,
    row_messages,
    token_ids_field,
    unknown_shape,
)
from draftsmith.stages.targets.info import TargetInfo
from draftsmith.stages.targets.sampling import SamplingParams

_THOUGHT = "reasoning_content"  # the field for what a server's reasoning parser removes from an answer's text
_TOO_LONG = "too long"
_MAX_TEMPERATURE = 1e6  # a larger number is not a temperature
_TOKEN_FIELDS = (PROMPT_IDS, "completion_token_ids")
# Fields of a request and their neutral values: at any temperature, penalties change even the target's best token.
_PENALTIES = {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1}
_GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")  # SGLang's own forms of a response_format
_ALL_TOKENS = 1 << 20  # a top_k that truncates nothing; for none, engines write -1, 0 or some large number


@dataclass(frozen=True)
class LoggedRow(Row):
    """One row of a log, with our names for its fields."""

    @property
    def log_id(self) -> str | None:
        """Return the service's id of the answer, a text or number."""
        value = self.fields.get("id")
        return str(value)[:MAX_SHOWN] if isinstance(value, str | int | float) else None

    @property
    def temperature(self) -> float | None:
        """Return the logged temperature; None if there is none. Raises DraftsmithError if it is not a temperature."""
        value = self.fields.get("temperature")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _MAX_TEMPERATURE:
            raise DraftsmithError(
                f"{self.where}: temperature {reprlib.repr(value)} is not a number of 0 or more. Correct the row."
            )
        return float(value)

    def sampling_difference(self, sampling: SamplingParams) -> str | None:
        """Return how the row's logged sampling differs from the configured one; None if nothing logged differs.

        Raises DraftsmithError if the logged temperature is not one.
        """
        temperature = self.temperature  # a Parquet file may have it as float32
        if temperature is not None and not math.isclose(temperature, sampling.temperature, rel_tol=1e-6):
            return f"another temperature ({temperature:.4g}; logs.temperature is {sampling.temperature:g})"
        if any(self._number(name, neutral) != neutral for name, neutral in _PENALTIES.items()):
            return "sampled with penalties"
        if _has_effect(self.fields.get("logit_bias")):
            return "sampled with a logit bias"
        form = self.fields.get("response_format")
        if isinstance(form, dict) and form.get("type") not in (None, "text"):
            return "sampled under a response_format"
        if any(isinstance(grammar := self.fields.get(name), str) and grammar for name in _GRAMMARS):
            return "sampled under a grammar"
        if sampling.greedy:
            return None
        if self._number("min_p", 0) != 0:
            return "sampled with min_p"
        top_p = self._number("top_p", sampling.top_p)  # a Parquet file may have it as float32
        if not 0 <= top_p <= 1 or not math.isclose(top_p, sampling.top_p, rel_tol=1e-6):
            return f"another top_p ({top_p:.4g}; logs.top_p is {sampling.top_p:g})"
        logged, configured = (
            k if 0 < k < _ALL_TOKENS else 0 for k in (self._number("top_k", sampling.top_k), sampling.top_k)
        )
        return f"another top_k ({logged:g}; logs.top_k is {configured})" if logged != configured else None

    def _number(self, name: str, default: float) -> float:
        """Return a field as a number, or the default if it is not one."""
        value = self.fields.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else default

    @property
    def stopped(self) -> bool:
        """Return whether the target ended the answer with a stop token, which its text does not show.

        The row must log it, and no stop string (`stop` of the request, `matched_stop` of the server) may be the cause.
        """
        matched, strings = self.fields.get("matched_stop"), self.fields.get("stop")
        by_string = isinstance(matched, str) or (matched is None and isinstance(strings, str | list) and bool(strings))
        return self.fields.get("finish_reason") == "stop" and not by_string

    @property
    def lacks_finish_reason(self) -> bool:
        """Return whether it is a row of text that does not say how the answer ended."""
        return self.fields.get("completion_token_ids") is None and self.fields.get("finish_reason") is None


def _has_effect(bias: Any) -> bool:
    """Return whether a logit bias (token → number) changes anything. A Parquet row has all tokens, most without one."""
    return isinstance(bias, dict) and any(isinstance(value, int | float) and value != 0 for value in bias.values())


@dataclass(frozen=True)
class LoggedAnswer:
    """Token ids of one logged answer."""

    prompt_ids: list[int]
    response_ids: list[int]
    messages: list[Message] | None = None  # of the prompt; None if the row has no messages


def logged_ids(row: LoggedRow) -> tuple[list[int], list[int]] | None:
    """Return prompt and answer of a row of token ids; None for a row of text. Raises DraftsmithError for bad ids."""
    if not any(row.fields.get(name) is not None for name in _TOKEN_FIELDS):
        return None
    prompt, answer = (token_ids_field(row.fields, name, row.where) for name in _TOKEN_FIELDS)
    return prompt, answer


def logged_text(row: LoggedRow) -> tuple[list[Message], str]:
    """Return prompt and answer of a row of text. Raises RejectedRow, and DraftsmithError for a row of another shape."""
    completion = row.fields.get("completion")
    if not isinstance(completion, str) or row.fields.get("messages") is None:
        raise unknown_shape(row.fields, row.where, of_logs=True)
    if isinstance(thought := row.fields.get(_THOUGHT), str) and thought.strip():
        raise RejectedRow("thinking that is not in the completion")
    return row_messages(row.fields, "messages", row.where, answered=False), completion


class AnswerReader:
    """Reads rows as token ids, with the target's tokenizer and chat template."""

    def __init__(self, tokenizer: Any, info: TargetInfo, config: LogsConfig):
        self.tokenizer, self._template_kwargs = tokenizer, config.chat_template_kwargs
        self.vocab_size, self.eos_ids = info.vocab_size, frozenset(info.eos_ids)
        self.max_tokens = config.max_tokens or info.max_positions
        self.stop_id = self._turn_end(info.eos_ids)

    def _turn_end(self, eos_ids: list[int]) -> int:
        """Return the stop token that ends answers: the one that the chat template puts after them."""
        eos = self.tokenizer.eos_token_id
        default = eos if eos in eos_ids or not eos_ids else eos_ids[0]
        after = self._encode(text_after_answer(self.tokenizer, self._template_kwargs))
        return int(next((token for token in after if token in eos_ids), default))

    def read(self, row: LoggedRow) -> LoggedAnswer:
        """Return a row's answer. Raises RejectedRow if it cannot be used, DraftsmithError if it is malformed."""
        ids = logged_ids(row)
        answer = self._from_text(row) if ids is None else self._from_ids(row, *ids)
        if len(answer.response_ids) < 2:
            raise RejectedRow("answer shorter than two tokens")
        if self.eos_ids.intersection(answer.response_ids[:-1]):
            raise RejectedRow("stop token inside the answer")
        if len(answer.prompt_ids) + len(answer.response_ids) > self.max_tokens:
            raise RejectedRow(_TOO_LONG)
        return answer

    def _from_ids(self, row: LoggedRow, prompt: list[int], answer: list[int]) -> LoggedAnswer:
        if not prompt:
            raise RejectedRow("empty prompt")
        if max(prompt + answer) >= self.vocab_size:
            raise RejectedRow("token id outside the target's vocabulary")
        return LoggedAnswer(prompt, answer, messages_beside_ids(row.fields))

    def _from_text(self, row: LoggedRow) -> LoggedAnswer:
        messages, completion = logged_text(row)
        if not completion:
            raise RejectedRow("answer shorter than two tokens")
        prompt, answer = self._tokenised(row, messages, completion)
        if row.stopped and answer[-1] not in self.eos_ids:
            answer = [*answer, self.stop_id]
        return LoggedAnswer(prompt, answer, messages)

    def _tokenised(self, row: LoggedRow, messages: list[Message], completion: str) -> tuple[list[int], list[int]]:
        if not is_unicode(completion, *(message["content"] for message in messages)):
            raise RejectedRow("text is not valid Unicode")
        prompt = token_ids(self.tokenizer, messages, row.where, self._template_kwargs)
        answer = self._encode(completion)
        if len(prompt) + len(answer) > self.max_tokens:  # decoding a megabyte takes seconds
            raise RejectedRow(_TOO_LONG)
        if self._decode(answer) != completion:
            raise RejectedRow("text does not survive tokenisation")
        if self._encode(self._decode(prompt + answer)) != prompt + answer:
            raise RejectedRow("prompt and answer are tokenised differently together")
        return prompt, answer

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
