"""The intake of a log: which of its rows may be trained on, judged one by one, for the stage and for its check."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Set
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.chat_template import TemplateInverter
from draftsmith.stages.data.held_out import HeldOut, digest
from draftsmith.stages.data.logs.config import LogsConfig
from draftsmith.stages.data.logs.rows import LoggedRow, Reader, TokenCache, logged_ids, logged_text
from draftsmith.stages.data.rejects import Aside
from draftsmith.stages.data.row_files import BadRow, Row
from draftsmith.stages.data.row_formats import SetAside, messages_beside_ids, passes, renamed
from draftsmith.stages.data.time_window import TIME_FIELDS, row_time
from draftsmith.stages.target.info import model_path, read_target_info
from draftsmith.stages.target.resolve import load_tokenizer

HELD_OUT = "prompt of the validation or held-out split"
DUPLICATE = "duplicate of an earlier row"
USED_BEFORE = "used by the champion's refresh"
_MODEL = "model"  # the field in which services write whose answer it is
_MOST_MODELS = 5  # that are named
_MUCH = 0.5  # of the rows taken
T = TypeVar("T")


@dataclass(frozen=True)
class Taken:
    """An answer that may be used."""

    prompt_ids: np.ndarray  # int32
    response_ids: np.ndarray  # int32
    finish_reason: str  # stop | length
    content: bytes  # digest of both: equal answers to equal prompts

    @property
    def prompt_id(self) -> str:
        return prompt_id(self.prompt_ids)


def prompt_id(ids: np.ndarray) -> str:
    """16 digits that equal prompts share."""
    return digest(ids).hex()[:16]


def content(prompt_ids: np.ndarray, response_ids: np.ndarray) -> bytes:
    """16 bytes that equal answers to equal prompts share."""
    return digest(np.concatenate([prompt_ids, np.array([-1], np.int32), response_ids]))


class Sieve(ABC, Generic[T]):
    """Rows of a log one by one: what of them is made into a `T`, and why the others are not."""

    def __init__(self, config: LogsConfig, aside: Aside):
        self.aside, self._config = aside, config
        self.outside_window = 0
        self.filtered = 0  # rows inside the window that `filter` does not let through
        self._models: Counter[str] = Counter()  # of the rows taken, where they say one
        self.taken = self._endless = 0  # rows taken, and of these, of text, those that do not say how they ended
        self.overlap = 0  # rows inside the window that a refresh before may have read
        self._outside: tuple[str, bool] = "", False  # the file of the row before, and whether that was
        self.newest: datetime | None = None  # of all rows read
        # a row of a clock that is wrong must not hide the rows of days to come from `since: last`
        self._latest = datetime.now(UTC) + timedelta(days=1)

    @property
    def not_meant(self) -> str:
        """How many rows were not asked for, in words; empty where all were."""
        counts = {"outside the window": self.outside_window, "not let through by filter": self.filtered}
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)

    def doubts(self) -> list[str]:
        """What is doubtful about the rows that were taken, and what to do."""
        found = []
        if len(self._models) > 1 and _MODEL not in self._config.filter:
            named = ", ".join(f"{count} of {name}" for name, count in self._models.most_common(_MOST_MODELS))
            found.append(
                f"the rows name {len(self._models)} models ({named}): `logs.filter: {{{_MODEL}: …}}` takes those of one"
            )
        if self._endless > _MUCH * self.taken:
            found.append(
                f"{self._endless} of {self.taken} rows are text without a finish_reason: only where that is `stop` is "
                "the stop token known to follow, and drafters learn where answers end"
            )
        return found

    @abstractmethod
    def _made(self, row: LoggedRow, time: datetime | None) -> T:
        """Of a row inside the window. Raises SetAside, and DraftsmithError for one of another shape."""

    def take(self, row: Row | BadRow) -> T | None:
        """None for a row that is not used. Raises DraftsmithError where no bad row is allowed."""
        self.aside.rows += 1
        if isinstance(row, BadRow):
            # nobody can say when it was logged: about when the row before it was
            self.aside.unreadable(row, outside=self._outside == (row.file, True))
            return None
        logged = LoggedRow(row.file, row.number, dict(renamed(row.fields, self._config.fields)))
        try:
            time = row_time(logged.fields)
            inside = self._in_window(time)
            self._outside = row.file, not inside
            if not inside:
                self.outside_window += 1
                self.aside.outside += 1
                return None
            self.overlap += self._config.read_before(time)
            if not passes(self._config.filter, row.fields, row.where):
                self.filtered += 1
                return None
            if (other := logged.drawn_otherwise(self._config.sampling)) is not None:
                raise SetAside(other)
            made = self._made(logged, time)
            self.taken += 1
            self._endless += logged.endless
            if isinstance(model := row.fields.get(_MODEL), str):
                self._models[model] += 1
            return made
        except SetAside as reason:
            self.aside.unusable(row.file, row.number, logged.log_id, str(reason))
        except DraftsmithError as error:
            bad = BadRow(row.file, row.number, str(error).removeprefix(f"{row.where}: "))
            self.aside.unreadable(bad, logged.log_id)
        return None

    def _in_window(self, time: datetime | None) -> bool:
        future = time is not None and time > self._latest
        if time is not None and not future:
            self.newest = max(self.newest or time, time)
        if not self._config.needs_time:
            return True
        if time is None:
            raise SetAside(f"no time that can be read in {', '.join(TIME_FIELDS)} (logs.fields names another)")
        if future:
            raise SetAside("time in the future")
        return self._config.holds(time)


class ShapeSieve(Sieve[bool]):
    """Judges rows without a tokenizer: by time, temperature and shape."""

    def _made(self, row: LoggedRow, time: datetime | None) -> bool:  # noqa: ARG002
        if logged_ids(row) is None:
            logged_text(row)
        else:
            messages_beside_ids(row.fields)
        return True


class Intake(Sieve[Taken]):
    """Rows → answers, each at most once."""

    def __init__(
        self,
        config: LogsConfig,
        target: Path,
        held_out: HeldOut,
        aside: Aside,
        cache: TokenCache | None = None,
        used_before: Set[bytes] = frozenset(),
    ):
        """target: its artifact, of which only the small files are read. cache: what an earlier attempt tokenised.
        used_before: `Taken.content` of the answers that the champion's refresh has used."""
        super().__init__(config, aside)
        self._used_before = used_before
        self.info = read_target_info(target)
        self.reader = Reader(load_tokenizer(model_path(target)), self.info, config, cache)
        self.unrendered = TemplateInverter(self.reader.tokenizer, config.chat_template_kwargs)
        self.held_out = held_out
        self._seen: set[bytes] = set()  # `Taken.content`

    def _made(self, row: LoggedRow, time: datetime | None) -> Taken:
        answer = self.reader.read(row)
        prompt_ids, response_ids = (np.asarray(ids, np.int32) for ids in (answer.prompt_ids, answer.response_ids))
        messages = self.unrendered.messages(answer.prompt_ids) if answer.messages is None else answer.messages
        if self.held_out.holds(messages, prompt_ids):
            raise SetAside(HELD_OUT)
        both = content(prompt_ids, response_ids)
        if both in self._seen:
            raise SetAside(DUPLICATE)
        if both in self._used_before and self._config.read_before(time):
            raise SetAside(USED_BEFORE)
        self._seen.add(both)
        stopped = answer.response_ids[-1] in self.reader.eos_ids
        return Taken(prompt_ids, response_ids, "stop" if stopped else "length", both)
