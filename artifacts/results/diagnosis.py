"""Result of stage `diagnosis`: `diagnosis.json`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from draftsmith.artifacts.results.base import Record, ResultFile


class ReplayChange(Record):
    """A change of replay, and its distance from the served steps."""

    cause: str
    change: str = ""
    mismatch: float = 0.0  # share of verify steps that differ; without recorded steps, of their number
    tau: float = 0.0


class DiagnosisResult(ResultFile, Record):
    """Why a server's steps differ from replay."""

    FILE: ClassVar[str] = "diagnosis.json"

    sentence: str
    agrees: bool
    served_tau: float | None = None
    as_it_is: ReplayChange | None = None  # replay without a change; None if the server itself names the cause
    causes: Sequence[ReplayChange] = ()
    tried: Sequence[ReplayChange] = ()
