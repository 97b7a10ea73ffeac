"""The run of a flow in MLflow: opened with the first stage that is made, found again where nothing had to be made."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.artifacts.store.manifest import ArtifactRef
from draftsmith.artifacts.tracking.refresh_runs import artifact_params, find_refresh, mark_reused, record_outcome
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.artifacts.tracking.terms import Status


@dataclass
class RunRecord:
    """Of one flow run. Stages that run at the same time open it once."""

    tracking: Tracking
    name: str
    params: Mapping[str, Any]
    _id: str | None = None
    _begun: bool = False  # a stage is made, or was: no earlier run has the same artifacts
    _earlier: str | None = None  # the finished run that has made the same artifacts
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self) -> str | None:
        """For a stage that is to be made: MLflow's id of the run; None if MLflow failed: the next call tries again."""
        self._begun = True
        return self._open()

    def settle(self, made: Mapping[str, ArtifactRef]) -> str | None:
        """When all nodes are there: the id of this run, or of the earlier one that has the very same artifacts; None if
        MLflow failed: the next call tries again."""
        if not self._begun and self._id is None and self._earlier is None:
            self._earlier = find_refresh(self.tracking, self.name, made)
        return self._earlier or self._open()

    def _open(self) -> str | None:
        with self._lock:
            if self._id is None:
                self._id = self.tracking.open_refresh(self.name, self.params)
            return self._id

    def close(
        self,
        status: Status,
        made: Mapping[str, ArtifactRef],
        figures: Mapping[str, float],
        files: Iterable[Path],
        tags: Mapping[str, str],
        data: Iterable[str] = (),
        *,
        concluded: bool = False,
    ) -> None:
        """End the run; an earlier one is only tagged, unless it had only looked (`--until`) and something follows now
        (`concluded`). A run that failed before any stage was begun leaves none.

        data: the nodes of `made` that are its data sets.
        """
        if self._earlier is not None:
            if concluded:
                record_outcome(self.tracking, self._earlier, made, figures, tags)
            mark_reused(self.tracking, self._earlier)
        else:
            inputs = {name: made[name] for name in data if name in made}
            self.tracking.close_refresh(status, figures, files, tags, inputs, artifact_params(made))
