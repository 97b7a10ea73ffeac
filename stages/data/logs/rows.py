"""Logged answers: rows of a production service, read as token ids of the target, or set aside with a reason.

Exact replay needs the very tokens that the target produced. A row with token ids has them. A row of text has them only
if tokenising it again gives the same text and the same cut between prompt and answer; otherwise it is set aside.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import pyarrow.parquet as pq

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.schemas import TOKENISED
from draftsmith.artifacts.tables.shards import TableShards
from draftsmith.stages.data.chat_template import text_after_answer, token_ids
from draftsmith.stages.data.logs.config import LogsConfig
from draftsmith.stages.data.prompt_config import Candidate
from draftsmith.stages.data.row_files import Row
from draftsmith.stages.data.row_formats import (
    PROMPT_IDS,
    Message,
    SetAside,
    is_unicode,
    messages_beside_ids,
    row_ids,
    row_messages,
)
from draftsmith.stages.target.info import TargetInfo
from draftsmith.stages.target.sampling import SamplingParams

SHAPES = (
    '{"messages": [{"role", "content"}], "completion": text} or '
    '{"prompt_token_ids": [...], "completion_token_ids": [...]}'
)
_THOUGHT = "reasoning_content"  # where servers put what a reasoning parser takes out of an answer's text
_TOO_LONG = "too long"
_HOTTEST = 1e6  # no sampling temperature is above
_TOKEN_FIELDS = (PROMPT_IDS, "completion_token_ids")
# Of a request, with the value that changes nothing: whatever the temperature, they move the target's best token too.
_PENALTIES = {"frequency_penalty": 0, "presence_penalty": 0, "repetition_penalty": 1}
_GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")  # what SGLang makes of a response_format
_ALL_TOKENS = 1 << 20  # a top_k that leaves nothing out; engines write -1, 0 or some large number for none
_WRITTEN_EVERY_S = 30.0
_TOKENS_AT_ONCE = 1 << 20  # in memory, some 40 MB
_BATCH = 128  # cached rows read at once

Tokens: TypeAlias = tuple[list[int], list[int], str]  # ids of the prompt, ids of the answer, why the row is not used


@dataclass(frozen=True)
class LoggedRow(Row):
    """One row of a log. `where` names it in errors."""

    @property
    def log_id(self) -> str | None:
        """The service's own name for the answer."""
        value = self.fields.get("id")
        return None if value is None else str(value)

    @property
    def temperature(self) -> float | None:
        """None where the row does not say. Raises DraftsmithError if it is no temperature."""
        value = self.fields.get("temperature")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < _HOTTEST:
            raise DraftsmithError(f"{self.where}: temperature {value!r} is not a number of 0 or more: correct the row")
        return float(value)

    def drawn_otherwise(self, sampling: SamplingParams) -> str | None:
        """Return which of its settings says that the answer was sampled otherwise than is stated for
        all; None where none does, or it says nothing. Raises DraftsmithError if its temperature is none."""
        temperature = self.temperature  # a Parquet file may have it as float32
        if temperature is not None and not math.isclose(temperature, sampling.temperature, rel_tol=1e-6):
            return "another temperature"
        if any(self._number(name, neutral) != neutral for name, neutral in _PENALTIES.items()):
            return "drawn with penalties"
        if _holds(self.fields.get("logit_bias")):
            return "drawn with a logit bias"
        form = self.fields.get("response_format")
        if isinstance(form, dict) and form.get("type") not in (None, "text"):
            return "drawn under a response_format"
        if any(isinstance(grammar := self.fields.get(name), str) and grammar for name in _GRAMMARS):
            return "drawn under a grammar"
        if sampling.greedy:
            return None
        if self._number("min_p", 0) != 0:
            return "drawn with min_p"
        top_p = self._number("top_p", sampling.top_p)  # a Parquet file may have it as float32
        if not 0 <= top_p <= 1 or not math.isclose(top_p, sampling.top_p, rel_tol=1e-6):
            return "another top_p"
        said, stated = (
            k if 0 < k < _ALL_TOKENS else 0 for k in (self._number("top_k", sampling.top_k), sampling.top_k)
        )
        return "another top_k" if said != stated else None

    def _number(self, name: str, usual: float) -> float:
        """A field; what is usual where it holds no number."""
        value = self.fields.get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) else usual

    @property
    def stopped(self) -> bool:
        """Did the target end the answer itself? Text does not show its stop token: the row has to say it, and nothing
        of stop strings, which end answers for the same reason: the request's `stop`, the server's `matched_stop`."""
        matched, strings = self.fields.get("matched_stop"), self.fields.get("stop")
        by_string = isinstance(matched, str) or (matched is None and isinstance(strings, str | list) and bool(strings))
        return self.fields.get("finish_reason") == "stop" and not by_string

    @property
    def endless(self) -> bool:
        """Is it text that does not say how it ended?"""
        return self.fields.get("completion_token_ids") is None and self.fields.get("finish_reason") is None


def _holds(bias: Any) -> bool:
    """Does a field of token → number move anything? Parquet rows have the tokens of all rows, most without a number."""
    return isinstance(bias, dict) and any(isinstance(each, int | float) and each != 0 for each in bias.values())


@dataclass(frozen=True)
class Answer:
    """Token ids of one logged answer."""

    prompt_ids: list[int]
    response_ids: list[int]
    messages: list[Message] | None = None  # of the prompt, if the row has them


def logged_ids(row: LoggedRow) -> tuple[list[int], list[int]] | None:
    """Prompt and answer of a row of token ids, None for one of text. Raises DraftsmithError for another shape."""
    if not any(row.fields.get(name) is not None for name in _TOKEN_FIELDS):
        return None
    prompt, response = (row_ids(row.fields, name, row.where) for name in _TOKEN_FIELDS)
    return prompt, response


def logged_text(row: LoggedRow) -> tuple[list[Message], str]:
    """Prompt and answer of a row of text. Raises SetAside, and DraftsmithError for another shape."""
    completion = row.fields.get("completion")
    if not isinstance(completion, str) or row.fields.get("messages") is None:
        known = ", ".join(sorted(name for name, value in row.fields.items() if value is not None)) or "nothing"
        raise DraftsmithError(
            f"{row.where}: none of the shapes {SHAPES}; it has {known}. Name its fields in logs.fields, or correct it"
        )
    if isinstance(thought := row.fields.get(_THOUGHT), str) and thought.strip():
        raise SetAside("thinking that is not in the completion")
    return row_messages(row.fields, "messages", row.where, answered=False), completion


class TokenCache:
    """Texts of a log as token ids, kept on disk until the stage ends: an interrupted one does not tokenise them again.

    Rows come in the same order in every attempt, so cached ones are read back in that order. A kill loses what the last
    half minute made.
    """

    def __init__(self, folder: Path):
        self._parts = TableShards(folder, {"texts": TOKENISED})
        self._cached = _cached_rows(self._parts.paths("texts"))
        self._next = next(self._cached, None)
        self._waiting: list[dict[str, Any]] = []
        self._tokens, self._written = 0, time.monotonic()
        self.hits = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._flush()

    def get(self, key: str, make: Callable[[], Tokens]) -> Tokens:
        """Return what `make` returns, or did in an earlier attempt. key: of the text, to see that it is the same."""
        if self._next is not None:
            if self._next["key"] != key:  # one that could not be tokenised at all: nothing of it was cached
                return make()
            cached, self._next = self._next, next(self._cached, None)
            self.hits += 1
            return cached["prompt_ids"], cached["response_ids"], cached["reason"]
        prompt_ids, response_ids, reason = made = make()
        row = {"key": key, "prompt_ids": prompt_ids, "response_ids": response_ids, "reason": reason}
        self._waiting.append(row)
        self._tokens += len(prompt_ids) + len(response_ids)
        if self._tokens >= _TOKENS_AT_ONCE or time.monotonic() - self._written >= _WRITTEN_EVERY_S:
            self._flush()
        return made

    def _flush(self) -> None:
        if self._waiting:
            self._parts.append({"texts": self._waiting})
        self._waiting, self._tokens, self._written = [], 0, time.monotonic()


def _cached_rows(paths: list[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                yield from batch.to_pylist()


class Reader:
    """Rows → token ids, with the target's tokenizer and chat template."""

    def __init__(self, tokenizer: Any, info: TargetInfo, config: LogsConfig, cache: TokenCache | None = None):
        self.tokenizer, self._cache = tokenizer, cache
        self._template_kwargs = config.chat_template_kwargs
        self.vocab_size, self.eos_ids = info.vocab_size, frozenset(info.eos_ids)
        self.max_tokens = config.max_tokens or info.max_positions
        self.stop_id = self._ends_turns(info.eos_ids)

    def _ends_turns(self, eos_ids: list[int]) -> int:
        """Return the token that ends an answer: of those that may, the one that the chat template has after one."""
        own = self.tokenizer.eos_token_id
        usual = own if own in eos_ids or not eos_ids else eos_ids[0]
        after = self._encode(text_after_answer(self.tokenizer, self._template_kwargs))
        return int(next((each for each in after if each in eos_ids), usual))

    def read(self, row: LoggedRow) -> Answer:
        """Raises SetAside for a row that cannot be used, DraftsmithError for one that is malformed."""
        ids = logged_ids(row)
        answer = self._from_text(row) if ids is None else self._from_ids(row, *ids)
        if len(answer.response_ids) < 2:
            raise SetAside("answer shorter than two tokens")
        if self.eos_ids.intersection(answer.response_ids[:-1]):
            raise SetAside("stop token inside the answer")
        if len(answer.prompt_ids) + len(answer.response_ids) > self.max_tokens:
            raise SetAside(_TOO_LONG)
        return answer

    def _from_ids(self, row: LoggedRow, prompt: list[int], response: list[int]) -> Answer:
        if not prompt:
            raise SetAside("empty prompt")
        if max(prompt + response) >= self.vocab_size:
            raise SetAside("token id outside the target's vocabulary")
        return Answer(prompt, response, messages_beside_ids(row.fields))

    def _from_text(self, row: LoggedRow) -> Answer:
        messages, completion = logged_text(row)
        if not completion:
            raise SetAside("answer shorter than two tokens")

        def make() -> Tokens:
            return self._tokenised(row, messages, completion)

        prompt, response, reason = make() if self._cache is None else self._cache.get(row.where, make)
        if reason:
            raise SetAside(reason)
        if row.stopped and response[-1] not in self.eos_ids:
            response = [*response, self.stop_id]
        return Answer(prompt, response, messages)

    def _tokenised(self, row: LoggedRow, messages: list[Message], completion: str) -> Tokens:
        if not is_unicode(completion, *(message["content"] for message in messages)):
            return [], [], "text is not valid Unicode"
        prompt = token_ids(self.tokenizer, Candidate("logs", messages, row.where), self._template_kwargs)
        response = self._encode(completion)
        if len(prompt) + len(response) > self.max_tokens:  # to read a megabyte back takes seconds, and is not needed
            return [], [], _TOO_LONG
        if self._decode(response) != completion:
            return [], [], "text does not survive tokenisation"
        if self._encode(self._decode(prompt + response)) != prompt + response:
            return [], [], "prompt and answer are tokenised differently together"
        return prompt, response, ""

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text
