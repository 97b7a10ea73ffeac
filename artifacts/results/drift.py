"""Result of stage `drift`: `drift.json`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import RootModel

from draftsmith.artifacts.results.base import ResultFile, SetMetrics

ALL = "all"  # prompts, beside the single sets


class DriftResult(ResultFile, RootModel[dict[str, SetMetrics]]):
    """The champion's tau by prompt set, and on all prompts under `ALL`."""

    FILE: ClassVar[str] = "drift.json"

    @property
    def overall(self) -> SetMetrics:
        """Return the metrics on all prompts."""
        return self.root[ALL]
