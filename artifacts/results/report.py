"""Result of stage `report`: `review.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar

from pydantic import Field

from draftsmith.artifacts.results.base import Record, ResultFile


class Outcome(Record):
    """The verdict of a report."""

    kind: str  # promoted, refused, inconclusive, or measured (without a gate)
    sentence: str
    reasons: Sequence[str] = ()
    followed: str | None = None  # the sentence of a promotion, once it is done
    label: str = ""


class ReviewResult(ResultFile, Record):
    """The fields of a report's review that other modules read."""

    FILE: ClassVar[str] = "review.json"

    outcome: Outcome | None = None  # None: nothing was measured
    speed_warnings: Annotated[Sequence[str], Field(alias="doubts")] = ()
    metrics: Annotated[Mapping[str, float], Field(alias="figures")] = {}
