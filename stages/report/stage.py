"""Declaration of stage `report`: the results of mining, trainings and evaluation on one page."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from draftsmith.artifacts.results.base import Record
from draftsmith.artifacts.results.gate import ReviewResult
from draftsmith.stages.runtime.stage import Config, FilledIn, NotInKey, Stage


class HistoryPoint(Record):
    """The acceptance length of a drafter of the line at one time."""

    at: str  # ISO 8601
    what: str  # promoted, checked, refused, or now: the challenger of this refresh
    version: int | None = None
    tau: float | None = None
    low: float | None = None  # ends of its 95 % interval
    high: float | None = None


class ReportConfig(Config):
    """The content of the report. A run fills in the fields for comparison."""

    contexts: Annotated[
        bool,
        Field(
            description="show stretches of held-out answers; false: `report.html`, which MLflow gets too, has no "
            "users' texts"
        ),
    ] = True
    champion: Annotated[
        tuple[str, int] | None,
        FilledIn(),
        Field(description="line and version of the drafter that serves"),
    ] = None
    line: Annotated[str | None, FilledIn(), NotInKey(), Field(description="the model line")] = None
    history: Annotated[
        tuple[HistoryPoint, ...],
        FilledIn(),
        NotInKey(),
        Field(description="acceptance lengths of the line's drafters over time"),
    ] = ()


STAGE = Stage(
    name="report",
    config=ReportConfig,
    inputs=("mining?", "evaluation", "sft", "opd?", "control?", "gate?", "drift?"),
    body="draftsmith.stages.report.body",
    volatile=("metrics.jsonl", "report.html", ReviewResult.FILE),  # they show durations and tokens/s
    reads_volatile=("evaluation", "gate"),
)
