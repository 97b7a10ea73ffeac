"""Stage `logs`: answers that the target gave in production, as trajectories, in place of a rollout.

Replay rebuilds the trace of any drafter on any answer of the target, so logged answers serve SFT, mining and OPD
unchanged. They must be this target's own: the tokens of every row are checked (`rows.py`), and a row that is not used
is counted and listed with its reason in `set_aside.jsonl`.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.listing import list_files
from draftsmith.stages.data.row_files import local_files, match_files, remote_versions
from draftsmith.stages.data.row_formats import FieldFilter, FieldNames, TemplateKwargs
from draftsmith.stages.data.time_window import LAST, Since, parse_time, window_start
from draftsmith.stages.runtime.stage import Compute, Config, FilledIn, InputListing, Stage
from draftsmith.stages.targets.info import read_target_info
from draftsmith.stages.targets.sampling import SamplingParams, TopK

_PATHS = "logs.paths"


def _as_list(value: object) -> object:
    return [value] if isinstance(value, str) else value


class LogsConfig(Config):
    """The answers of a log that are used."""

    paths: Annotated[
        list[str],
        BeforeValidator(_as_list),
        Field(
            min_length=1,
            description="files, folders and globs, relative to the current directory, or addresses for fsspec such as "
            "s3://bucket/logs/*.jsonl.zst; JSON Lines (plain, .gz, .zst) or .parquet",
        ),
    ]
    filter: FieldFilter = Field(
        default={},
        description="only rows whose fields have this value or one of these, e.g. {model: my-target} where a log holds "
        "the answers of several models",
    )
    fields: FieldNames = Field(
        default={},
        description="the rows' names for our fields, e.g. {messages: question, completion: answer}; text in place of "
        "messages is one user message. From two of `started_at`, `ended_at`, `duration_s`, and from `server`, "
        "`draftsmith check` and the log of the stage compute `gate.loads`",
    )
    temperature: float = Field(
        ge=0,
        description="sampling temperature of the answers; a row that logs another one is rejected, one that logs none "
        "counts as having this one. 0 = greedy",
    )
    top_p: float = Field(default=1.0, gt=0, le=1, description="top_p that the answers were sampled at")
    top_k: TopK = Field(default=0, description="top_k that the answers were sampled at; 0 = none")
    since: Since | None = Field(
        default=None,
        description="only rows from this time on: 7d, 12h, an ISO date or time, or `last`: what the champion's refresh "
        "has not read yet (everything if there is no champion). 7d and 12h count back from the start of the run: to "
        "midnight for days, to a full hour for hours (UTC), so that a run started again on that day or in that hour is "
        "the same run",
    )
    after: Annotated[
        str | None,
        FilledIn(),
        Field(description="only rows later than this ISO time: the meaning of `since: last` when the plan is made"),
    ] = None
    lateness_hours: float = Field(
        default=1.0,
        ge=0,
        le=24 * 366,
        description="for `since: last`: a row that arrives later may be this much older than the newest row read (in "
        "the same second, in a file uploaded late, with the time of its request); with several hosts, set at least the "
        "time that one file spans. The window begins this much earlier, and rows that the champion's refresh has used "
        "are not used again. 0: it begins after the newest row",
    )
    rows: int | None = Field(default=None, ge=1, description="use at most this many answers, the first ones")
    replay_share: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of the used answers that are replayed from the champion's refresh, if there is a champion",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=2,
        description="limit of prompt and answer together; longer rows are rejected. Default: the target's context",
    )
    max_bad_share: float = Field(
        default=0.01,
        ge=0,
        le=1,
        description="share of the rows that may be unreadable (half-written, of another shape, not UTF-8): they are "
        "rejected. 0: the first one is an error",
    )
    scored: int = Field(
        default=64,
        ge=0,
        description="number of used answers that the target scores: its log-probs show whether they are its own at "
        "this temperature; those that are not are counted and listed in improbable.jsonl",
    )
    max_foreign_share: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="share of the answers that may be foreign: not what the target gives at this temperature. The run "
        "stops if the lower end of the share's interval (95 %) is above it: with 64 scored, from 8 foreign ones on",
    )
    chat_template_kwargs: TemplateKwargs = Field(
        default={}, description="passed to the chat template for rows of text, as your service passes them"
    )

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(self.temperature, self.top_p, self.top_k)

    @property
    def since_time(self) -> datetime | None:
        """Return the beginning of the window, if `since` is a time."""
        return window_start(self.since, self._listing)

    def in_window(self, time: datetime) -> bool:
        """Return whether the time is inside the window."""
        since, after = self.since_time, parse_time(self.after)
        return (since is None or time >= since) and (after is None or time > after - self._lateness)

    def may_have_been_read(self, time: datetime | None) -> bool:
        """Return whether the champion's refresh read a row of this time, unless the row arrived late."""
        end = parse_time(self.after)
        return self.overlaps and end is not None and time is not None and time <= end

    @property
    def overlaps(self) -> bool:
        """Return whether the window begins before the newest row that the champion's refresh has read."""
        return self.after is not None and self._lateness > timedelta(0)

    @property
    def _lateness(self) -> timedelta:
        return timedelta(hours=self.lateness_hours if self.since == LAST else 0)

    def files(self) -> list[str]:
        """Return the files in reading order. Raises DraftsmithError for a path, folder or glob without any."""
        return match_files(self.paths, _PATHS, self.pinned_files)

    def list_files(self) -> InputListing | None:
        return list_files(self.paths, _PATHS, [self.since])

    def external_files(self) -> list[Path]:
        """Return the files on this machine. Raises DraftsmithError for a path, folder or glob without any."""
        return local_files(self.paths, _PATHS, self.pinned_files)

    def external_versions(self) -> dict[str, str]:
        return remote_versions(self.paths, _PATHS, self.pinned_files)


def preflight(config: LogsConfig, target: Path) -> None:
    """Check that rows of the allowed length fit into the target's context."""
    limit = read_target_info(target).max_positions
    if config.max_tokens is not None and config.max_tokens > limit:
        raise DraftsmithError(f"logs.max_tokens {config.max_tokens} exceeds the target's {limit} positions. Lower it.")


STAGE = Stage(
    name="logs",
    config=LogsConfig,
    inputs=("target", "prompts?", "earlier?"),
    body="draftsmith.stages.data.logs.body",
    preflight=preflight,
    compute=Compute.HEAVY,
)
