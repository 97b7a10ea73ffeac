"""The intake of a log: which of its rows may be trained on, judged one by one, for the stage and for its check."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.prompting.aside import Aside
from draftsmith.stages.prompting.files import BadRow, Row
from draftsmith.stages.prompting.held_out import HeldOut, digest
from draftsmith.stages.prompting.logged import LoggedRow, Reader, SetAside
from draftsmith.stages.prompting.logs_config import LogsConfig
from draftsmith.stages.prompting.times import row_time
from draftsmith.stages.prompting.unrendered import Unrendered
from draftsmith.stages.targets.info import model_path, read_target_info
from draftsmith.stages.targets.resolve import load_tokenizer

HELD_OUT = "prompt of the validation or held-out split"
DUPLICATE = "duplicate of an earlier row"


@dataclass(frozen=True)
class Taken:
    """An answer that may be used."""

    prompt_ids: np.ndarray  # int32
    response_ids: np.ndarray  # int32
    finish_reason: str  # stop | length
    source: str  # "" without a source field
    time: datetime | None
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


class Intake:
    """Rows → answers, each at most once. What is not taken is counted, here or in `aside`."""

    def __init__(self, config: LogsConfig, target: Path, held_out: HeldOut, aside: Aside):
        """target: its artifact, of which only the small files are read."""
        info = read_target_info(target)
        self.reader = Reader(
            load_tokenizer(model_path(target)),
            vocab_size=info.vocab_size,
            eos_ids=info.eos_ids,
            max_tokens=config.max_tokens or info.max_positions,
            max_prompt_tokens=config.max_prompt_tokens,
            template_kwargs=config.chat_template_kwargs,
        )
        self.unrendered = Unrendered(self.reader.tokenizer, config.chat_template_kwargs)
        self.held_out, self.aside, self._config = held_out, aside, config
        self.outside_window = 0
        self.without_source = 0
        self.newest: datetime | None = None  # of all rows read
        self.seen: set[bytes] = set()  # `Taken.content`
        # a row of a clock that is wrong must not hide the rows of days to come from `since: last`
        self._latest = datetime.now(UTC) + timedelta(days=1)

    def take(self, row: Row | BadRow) -> Taken | None:
        """The answer, None for a row that is not used. Raises DraftsmithError where no bad row is allowed."""
        self.aside.rows += 1
        if isinstance(row, BadRow):
            self.aside.unreadable(row)
            return None
        logged = LoggedRow(row.file, row.number, row.fields)
        try:
            return self._taken(logged)
        except SetAside as reason:
            self.aside.unusable(row.file, row.number, logged.log_id, str(reason))
        except DraftsmithError as error:
            bad = BadRow(row.file, row.number, str(error).removeprefix(f"{row.where}: "))
            self.aside.unreadable(bad, logged.log_id)
        return None

    def _taken(self, row: LoggedRow) -> Taken | None:
        time = row_time(row.fields, self._config.time_field)
        future = time is not None and time > self._latest
        if time is not None and not future:
            self.newest = max(self.newest or time, time)
        if self._config.needs_time:
            if time is None:
                raise SetAside("no time that can be read")
            if not self._config.holds(time):
                self.outside_window += 1
                return None
            if future:
                raise SetAside("time in the future")
        if row.temperature not in (None, self._config.temperature):
            raise SetAside("another temperature")
        answer = self.reader.read(row)
        prompt_ids, response_ids = (np.asarray(ids, np.int32) for ids in (answer.prompt_ids, answer.response_ids))
        messages = self.unrendered.messages(answer.prompt_ids) if answer.messages is None else answer.messages
        if self.held_out.holds(messages, prompt_ids):
            raise SetAside(HELD_OUT)
        both = content(prompt_ids, response_ids)
        if both in self.seen:
            raise SetAside(DUPLICATE)
        self.seen.add(both)
        stopped = answer.response_ids[-1] in self.reader.eos_ids
        return Taken(prompt_ids, response_ids, "stop" if stopped else "length", self._source(row), time, both)

    def _source(self, row: LoggedRow) -> str:
        if self._config.source_field is None:
            return ""
        value = row.fields.get(self._config.source_field)
        self.without_source += value is None
        return "" if value is None else str(value)
