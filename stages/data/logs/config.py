"""The section `logs`: which answers of which files are used."""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from draftsmith.stages.data.listing import SourcesConfig
from draftsmith.stages.data.row_files import local_files, matched, remote_versions
from draftsmith.stages.data.row_formats import FieldNames, Filter
from draftsmith.stages.data.time_window import LAST, Since, as_time, beginning
from draftsmith.stages.runtime.stage import Config, FilledIn
from draftsmith.stages.target.sampling import SamplingParams, TopK

_PATHS = "logs.paths"


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class LogsConfig(Config):
    """Which answers of a log are used."""

    paths: Annotated[
        list[str],
        BeforeValidator(_as_list),
        Field(
            min_length=1,
            description="files, folders and globs, relative to the current directory, or addresses for fsspec such as "
            "s3://bucket/logs/*.jsonl.zst; JSON Lines (plain, .gz, .zst) or .parquet",
        ),
    ]
    filter: Filter = Field(
        default={},
        description="only rows whose fields have this value or one of these, e.g. {model: my-target} where a log holds "
        "the answers of several models",
    )
    fields: FieldNames = Field(
        default={},
        description="what the rows call their fields, e.g. {messages: question, completion: answer}; text in place of "
        "messages is the one message of a user",
    )
    temperature: float = Field(
        ge=0,
        description="sampling temperature of the answers; a row that says another one is set aside, one that says none "
        "is taken to have this one. 0 = greedy",
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="that the answers were sampled with")
    top_k: TopK = Field(default=0, description="that the answers were sampled with; 0 = none")
    since: Since | None = Field(
        default=None,
        description="only rows from this time on: 7d, 12h, an ISO date or time, or `last`: what the champion's refresh "
        "has not read yet (all of them where there is no champion yet). 7d and 12h are counted back from when the run "
        "begins: to a midnight for days, a full hour for hours (UTC), so that one that begins again on that day or in "
        "that hour is the same run",
    )
    after: Annotated[
        str | None,
        FilledIn(),
        Field(description="only rows later than this ISO time: what `since: last` means when the plan is made"),
    ] = None
    lateness_hours: float = Field(
        default=1.0,
        ge=0,
        le=24 * 366,
        description="of `since: last`: how much older than the newest row that was read a row may be that comes later "
        "(of the same second, in a file that is uploaded late, with the time of its request): of several hosts, at "
        "least the time that one file spans. The window begins so much earlier, and what the champion's refresh has "
        "used of it is not used again. 0: it begins behind that row",
    )
    rows: int | None = Field(default=None, ge=1, description="use at most the first so many answers")
    replay_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the used answers that the champion's refresh has used before, if there is a champion",
    )
    max_tokens: int | None = Field(
        default=None, ge=2, description="prompt and answer; longer rows are set aside. Left out: the target's context"
    )
    max_bad_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="share of the rows that may be unreadable (half-written, of another shape, not UTF-8): they are "
        "set aside. 0: the first one is an error",
    )
    scored: int = Field(
        default=64,
        ge=0,
        description="so many of the used answers are read by the target, whose log-probs say whether they are its own "
        "at this temperature, top_p and top_k; those that are not are counted and listed in improbable.jsonl",
    )
    chat_template_kwargs: dict[str, bool | int | float | str | None] = Field(
        default={}, description="passed to the chat template for rows of text: what the service passed"
    )

    @property
    def sampling(self) -> SamplingParams:
        """That the answers were drawn by."""
        return SamplingParams(self.temperature, self.top_p, self.top_k)

    @property
    def needs_time(self) -> bool:
        """Is a row without a time of no use?"""
        return self.since is not None or self.after is not None

    @property
    def since_time(self) -> datetime | None:
        """Rows from here on, if `since` says a time."""
        return beginning(self.since, self._listing)

    def holds(self, time: datetime) -> bool:
        """Is this time inside the window?"""
        since, after = self.since_time, as_time(self.after)
        return (since is None or time >= since) and (after is None or time > after - self._lateness)

    def read_before(self, time: datetime | None) -> bool:
        """Is this time so early that a refresh before may have read its row, which came late otherwise?"""
        end = as_time(self.after)
        return self.overlaps and end is not None and time is not None and time <= end

    @property
    def overlaps(self) -> bool:
        """Does the window begin earlier than what was read ends?"""
        return self.after is not None and self._lateness > timedelta(0)

    @property
    def _lateness(self) -> timedelta:
        return timedelta(hours=self.lateness_hours if self.since == LAST else 0)

    def files(self) -> list[str]:
        """The logs, in the order in which they are read. Raises DraftsmithError for a path, folder or glob without
        any."""
        return matched(self.paths, _PATHS, self.pinned_files)

    @property
    def to_list(self) -> SourcesConfig | None:
        """What stage `sources` lists for it; None where nothing has to be listed."""
        return SourcesConfig.of(self.paths, _PATHS, [self.since])

    def external_files(self) -> list[Path]:
        """The logs on this machine. Raises DraftsmithError for a path, folder or glob without any."""
        return local_files(self.paths, _PATHS, self.pinned_files)

    def external_versions(self) -> dict[str, str]:
        """The logs elsewhere, with their versions."""
        return remote_versions(self.paths, _PATHS, self.pinned_files)
