"""Results of stages `prompts` and `logs`: `prompts.json` and `logs.json`."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import ClassVar, Literal

from draftsmith.artifacts.results.base import Record, ResultFile


def day(time: datetime) -> str:
    """Return `24 Nov`."""
    return f"{time.day} {time:%b}"


class PromptsSummary(ResultFile, Record):
    """Counts of the prompts that stage `prompts` chose and rejected."""

    FILE: ClassVar[str] = "prompts.json"

    counts: Mapping[str, Mapping[str, int]] = {}  # source -> split -> prompts
    prompt_tokens: Mapping[str, Mapping[str, int]] = {}  # split -> min, p50, p90, max
    duplicates_removed: int = 0
    too_long_skipped: int = 0
    heldout_share: float | None = None
    heldout_by: Literal["prompt", "conversation"] | None = None
    wrong_class_passed_over: int = 0
    set_aside: Mapping[str, int] = {}  # reason -> rejected rows
    slices: Mapping[str, Mapping[str, int]] = {}  # label -> split -> prompts
    conversations: int = 0  # prompts with further questions


class LogWindow(Record):
    """The times of the logged rows that were read."""

    since: str | None = None
    after: str | None = None
    newest: str | None = None

    @property
    def text(self) -> str:
        """Return `week of 24 Nov`, `24 Nov to 9 Dec`, `24 Nov` or `until 9 Dec`; empty if rows have no times."""
        first, last = (
            datetime.fromisoformat(time) if time else None for time in (self.since or self.after, self.newest)
        )
        if last is None:
            return ""
        if first is None:
            return f"until {day(last)}"
        if first.date() == last.date():
            return day(last)
        return f"week of {day(first)}" if 5 <= (last - first).days <= 7 else f"{day(first)} to {day(last)}"


class LogsSummary(ResultFile, Record):
    """Counts of the rows that stage `logs` read, used and rejected."""

    FILE: ClassVar[str] = "logs.json"

    rows_in_files: int | None = None
    rows_read: int = 0
    used: int = 0
    replayed: int = 0  # answers of the earlier refresh that were mixed in
    replay_left_out: str | None = None  # why none were
    set_aside: Mapping[str, int] = {}  # reason -> rejected rows
    outside_window: int = 0
    filtered: int = 0
    not_drawn: int = 0  # usable rows that were not sampled
    response_tokens: int = 0
    scored: int = 0
    improbable: Mapping[str, int] = {}  # reason -> answers
    heldout_share: float | None = None
    window: LogWindow = LogWindow()
    loads: Mapping[int, float] = {}  # requests in flight -> share of the time; empty where rows do not state times
    given_by: Mapping[str, str] = {}  # digests of the target and its tokenizer
