"""Decides which rows of a log may be trained on, for the stage and for its check; and which earlier answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.data.chat_template import TemplateInverter
from draftsmith.stages.data.held_out import HeldOut, token_digest
from draftsmith.stages.data.logs.earlier import TABLE, answer_content, read_batches, select_rows
from draftsmith.stages.data.logs.rows import AnswerReader, LoggedRow, logged_ids, logged_text
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.data.row_files import BadRow, RejectLog, Row
from draftsmith.stages.data.row_formats import Message, RejectedRow, matches_filter, messages_beside_ids, rename_fields
from draftsmith.stages.data.time_window import TIME_FIELDS, parse_time, row_time
from draftsmith.stages.data.trajectories import random_rank
from draftsmith.stages.targets.info import load_tokenizer, model_path, read_target_info
from draftsmith.stages.targets.sampling import SamplingParams

HELD_OUT = "prompt of the validation or held-out split"
DUPLICATE = "duplicate of an earlier row"
USED_BEFORE = "used by the champion's refresh"
_MODEL = "model"  # the field in which services log whose answer it is
_MAX_MODELS_NAMED = 5
_MANY = 0.5  # share of the accepted rows
_COLUMNS = ["split", "temperature", "top_p", "top_k", "prompt_ids", "response_ids"]  # of earlier answers
TIMES = ("started_at", "ended_at", "duration_s")  # our names of a row's fields; two of them are enough
_LONGEST_S = 86400.0  # a longer request has a wrong clock, or no real end
T = TypeVar("T")


@dataclass(frozen=True)
class AcceptedAnswer:
    """An answer that may be trained on."""

    prompt_ids: np.ndarray  # int32
    response_ids: np.ndarray  # int32
    finish_reason: str  # stop | length
    content: bytes  # of `answer_content`

    @property
    def prompt_id(self) -> str:
        return prompt_id(self.prompt_ids)


def prompt_id(ids: np.ndarray) -> str:
    """Return 16 digits that equal prompts share."""
    return token_digest(ids).hex()[:16]


class InFlight:
    """When the requests of a log began and ended, by server."""

    def __init__(self) -> None:
        self.timed = self.untimed = 0  # rows
        self._spans: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))  # server -> begin, end, begin, …

    def add(self, fields: Mapping[str, Any]) -> None:
        """Count a row. fields: under our names. Rows without `server` count as those of one server."""
        if (span := _span(fields)) is None:
            self.untimed += 1
            return
        self.timed += 1
        server = fields.get("server")
        self._spans[str(server) if isinstance(server, str | int | float) else ""].extend(span)

    def shares(self) -> dict[int, float]:
        """Return requests in flight, to the nearest power of two -> share of the time in which there are any."""
        seconds = np.zeros(64)  # by the logarithm of their number
        for spans in self._spans.values():
            times = np.asarray(spans)
            order = times.argsort(kind="stable")
            in_flight = np.tile([1, -1], len(times) // 2)[order].cumsum()[:-1]
            busy = in_flight > 0
            powers = np.log2(in_flight[busy]).round().astype(int)
            seconds += np.bincount(powers, np.diff(times[order])[busy], minlength=64)
        shares = (seconds / max(seconds.sum(), 1e-9)).round(3)
        return {1 << power: float(share) for power, share in enumerate(shares) if share > 0}


def _span(fields: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return when a request began and ended, in seconds since 1970; None if the row does not say when."""
    begin, end = (None if (time := parse_time(fields.get(name))) is None else time.timestamp() for name in TIMES[:2])
    seconds = fields.get("duration_s")
    if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds <= _LONGEST_S:
        begin = end - seconds if begin is None and end is not None else begin
        end = begin + seconds if end is None and begin is not None else end
    if begin is None or end is None or not 0 <= end - begin <= _LONGEST_S:
        return None
    return begin, end


class RowFilter(ABC, Generic[T]):
    """Accepts the rows of a log one by one, as objects of type `T`, or rejects them with a reason."""

    def __init__(self, config: LogsConfig, rejects: RejectLog):
        self.rejects, self._config = rejects, config
        self.outside_window = 0
        self.filtered = 0  # rows inside the window that `filter` excludes
        self._models: Counter[str] = Counter()  # of the accepted rows that name one
        self.accepted = self._unfinished = 0  # accepted rows; of these, rows of text without a finish_reason
        self.overlap = 0  # rows inside the window that the champion's refresh may have read
        self._previous: tuple[str, bool] = "", False  # of the row before: its file, and whether outside the window
        self.newest: datetime | None = None  # of all rows read
        self.in_flight = InFlight()  # rows inside the window that `filter` lets through, whether usable or not
        self._now = datetime.now(UTC)  # a row from a clock ahead of it must not make `since: last` skip rows to come

    def describe_unselected(self) -> str:
        """Return how many rows the config does not select, in words; empty if there are none."""
        counts = {"outside the window": self.outside_window, "not let through by filter": self.filtered}
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)

    def warnings(self) -> list[str]:
        """Return what is suspicious about the accepted rows, each with a remedy."""
        warnings = []
        if len(self._models) > 1 and _MODEL not in self._config.filter:
            named = ", ".join(f"{count} of {name}" for name, count in self._models.most_common(_MAX_MODELS_NAMED))
            warnings.append(
                f"the rows name {len(self._models)} models ({named}). Select one with `logs.filter: {{{_MODEL}: …}}`."
            )
        if self._unfinished > _MANY * self.accepted:
            warnings.append(
                f"{self._unfinished} of {self.accepted} rows are text without a finish_reason. Log it: after "
                "`stop`, and only then, the stop token is added, from which drafters learn where answers end."
            )
        untimed, timed = self.in_flight.untimed, self.in_flight.timed
        if untimed and (timed or not self._config.fields.keys().isdisjoint(TIMES)):
            warnings.append(
                f"{untimed} of {untimed + timed} rows do not say when their request began and ended, so requests in "
                f"flight are not all counted. Name two of {', '.join(TIMES)} in logs.fields."
            )
        return warnings

    @abstractmethod
    def _convert(self, row: LoggedRow, time: datetime | None) -> T:
        """Convert a row that lies in the time window.

        Raises RejectedRow if it cannot be used, DraftsmithError if its shape is unknown.
        """

    def accept(self, row: Row | BadRow) -> T | None:
        """Return the converted row; None if it is rejected. Raises DraftsmithError where no bad row is allowed."""
        self.rejects.rows += 1
        if isinstance(row, BadRow):
            # its time is unknown, so it counts as logged at about the time of the row before it
            self.rejects.add_unreadable(row, outside=self._previous == (row.file, True))
            return None
        logged = LoggedRow(row.file, row.number, dict(rename_fields(row.fields, self._config.fields)))
        try:
            time = row_time(logged.fields)
            inside = self._in_window(time)
            self._previous = row.file, not inside
            if not inside:
                self.outside_window += 1
                self.rejects.outside += 1
                return None
            self.overlap += self._config.may_have_been_read(time)
            if not matches_filter(self._config.filter, row.fields, row.where):
                self.filtered += 1
                return None
            self.in_flight.add(logged.fields)
            if (difference := logged.sampling_difference(self._config.sampling)) is not None:
                raise RejectedRow(difference)
            converted = self._convert(logged, time)
            self.accepted += 1
            self._unfinished += logged.lacks_finish_reason
            if isinstance(model := row.fields.get(_MODEL), str):
                self._models[model] += 1
            return converted
        except RejectedRow as reason:
            self.rejects.add_unusable(row.file, row.number, logged.log_id, str(reason))
        except DraftsmithError as error:
            bad = BadRow(row.file, row.number, str(error).removeprefix(f"{row.where}: "))
            self.rejects.add_unreadable(bad, logged.log_id)
        return None

    def _in_window(self, time: datetime | None) -> bool:
        future = time is not None and time > self._now
        if time is not None and not future:
            self.newest = max(self.newest or time, time)
        if self._config.since is None and self._config.after is None:
            return True
        if time is None:
            raise RejectedRow(f"no time that can be read in {', '.join(TIME_FIELDS)} (logs.fields names another)")
        if future:
            raise RejectedRow("time in the future")
        return self._config.in_window(time)


class SchemaFilter(RowFilter[bool]):
    """Checks rows without a tokenizer: their time, sampling and shape."""

    def _convert(self, row: LoggedRow, time: datetime | None) -> bool:  # noqa: ARG002
        if logged_ids(row) is None:
            logged_text(row)
        else:
            messages_beside_ids(row.fields)
        return True


class LogFilter(RowFilter[AcceptedAnswer]):
    """Accepts the answers that may be trained on, each once."""

    def __init__(
        self,
        config: LogsConfig,
        target: Path,
        held_out: HeldOut,
        rejects: RejectLog,
        used_before: Set[bytes] = frozenset(),
    ):
        """Load the tokenizer. target: folder of its artifact. used_before: `answer_content` of answers to skip."""
        super().__init__(config, rejects)
        self._held_out, self._used_before = held_out, used_before
        self.info = read_target_info(target)
        self.reader = AnswerReader(load_tokenizer(model_path(target)), self.info, config)
        self._inverter = TemplateInverter(self.reader.tokenizer, config.chat_template_kwargs)
        self._seen: set[bytes] = set()  # `answer_content`

    def _convert(self, row: LoggedRow, time: datetime | None) -> AcceptedAnswer:
        answer = self.reader.read(row)
        prompt_ids, answer_ids = (np.asarray(ids, np.int32) for ids in (answer.prompt_ids, answer.response_ids))
        if self.is_held_out(prompt_ids, answer.messages):
            raise RejectedRow(HELD_OUT)
        content = answer_content(prompt_ids, answer_ids)
        if content in self._seen:
            raise RejectedRow(DUPLICATE)
        if content in self._used_before and self._config.may_have_been_read(time):
            raise RejectedRow(USED_BEFORE)
        self._seen.add(content)
        stopped = answer.response_ids[-1] in self.reader.eos_ids
        return AcceptedAnswer(prompt_ids, answer_ids, "stop" if stopped else "length", content)

    def is_held_out(self, prompt_ids: np.ndarray, messages: Sequence[Message] | None = None) -> bool:
        """Return whether the prompt must not be trained on. messages: the row's; None: decode them from the ids."""
        known = self._inverter.messages(prompt_ids) if messages is None else messages
        return self._held_out.is_held_out(known, prompt_ids)

    def fits(self, prompt_ids: np.ndarray, answer_ids: np.ndarray) -> bool:
        """Return whether an answer has a usable length and the target's vocabulary."""
        if len(answer_ids) < 2 or len(prompt_ids) + len(answer_ids) > self.reader.max_tokens:
            return False
        return bool(max(prompt_ids.max(initial=0), answer_ids.max(initial=0)) < self.reader.vocab_size)


@dataclass(frozen=True)
class EarlierAnswers:
    """The answers of an earlier artifact that may be trained on: same sampling, and accepted by the log filter."""

    path: Path
    contents: list[bytes | None]  # of every row; None: not to be used
    of_other_sampling: int = 0  # rows that are not used because they were sampled differently

    def choose(self, count: int, seed: int, excluded: set[bytes]) -> np.ndarray:
        """Return a mask [rows] of at most `count` random answers that are not in `excluded`."""
        usable = [(content, row) for row, content in enumerate(self.contents) if content and content not in excluded]
        ranked = sorted((random_rank(seed, content), row) for content, row in usable)
        mask = np.zeros(len(self.contents), dtype=bool)
        mask[[row for _, row in ranked[:count]]] = True
        return mask

    @property
    def usable(self) -> int:
        return sum(content is not None for content in self.contents)

    def rows(self, mask: np.ndarray) -> Iterator[pa.Table]:
        """Yield the rows that the mask selects in batches, with the prompt ids of stage `logs`."""
        for batch in select_rows(self.path, mask):
            ids = [prompt_id(row.values.to_numpy()) for row in batch["prompt_ids"]]
            column = batch.column_names.index("prompt_id")
            yield batch.set_column(column, "prompt_id", pa.array(ids, pa.string()))


def read_earlier_answers(
    folder: Path, log_filter: LogFilter, sampling: SamplingParams, progress: Callable[[int, int], None]
) -> EarlierAnswers:
    """Read the usable answers of an artifact of stage `earlier`.

    sampling: that of the new answers. progress: a function called with the number of answers read as both arguments.

    Raises DraftsmithError if the table is damaged or of another version.
    """
    path = folder / TABLE
    read_table(path, TRAJECTORIES, columns=["sample"])  # checks that it is intact and of this version
    contents: list[bytes | None] = []
    seen: set[bytes | None] = set()
    temperature, top_p = (float(np.float32(value)) for value in (sampling.temperature, sampling.top_p))  # as stored
    stored_sampling = SamplingParams(temperature, top_p, sampling.top_k)
    of_other_sampling = 0
    for batch in read_batches(path, _COLUMNS):
        for split, *values, prompt, answer in zip(*(batch[name] for name in _COLUMNS), strict=True):
            content = None
            if split.as_py() == "train":
                prompt_ids, answer_ids = prompt.values.to_numpy(), answer.values.to_numpy()
                if SamplingParams(*(value.as_py() for value in values)) != stored_sampling:
                    of_other_sampling += 1
                elif log_filter.fits(prompt_ids, answer_ids) and not log_filter.is_held_out(prompt_ids):
                    content = answer_content(prompt_ids, answer_ids)
            contents.append(None if content in seen else content)
            seen.add(content)
        progress(len(contents), len(contents))
    return EarlierAnswers(path, contents, of_other_sampling)
