"""The drafter that served a rollout (`trace.json`), and the champion that a refresh adopts (`champion.json`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from draftsmith.artifacts.results.base import Record, ResultFile


class TraceSource(ResultFile, Record):
    """The drafter and the settings that served the verify steps of a rollout's trace."""

    FILE: ClassVar[str] = "trace.json"

    block_size: int | None = None  # None: as trained
    differs: Sequence[str] = ()  # settings in which the served target differs from the one in transformers
    drafter_digest: str
    dtype: str | None  # None: running servers, whose dtype no config states
    engine: str
    head_tokens: int | None = None
    temperature: float


class AdoptedChampion(ResultFile, Record):
    """The digests of the target that a champion was trained for, and of today's."""

    FILE: ClassVar[str] = "champion.json"

    target: str
    target_changed: bool
    trained_for: str
