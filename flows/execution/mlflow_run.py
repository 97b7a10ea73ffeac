"""The MLflow run of a flow: opened with the first stage that is built, or found if nothing has to be built."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.artifacts.store.manifest import ArtifactRef
from draftsmith.artifacts.tracking.refresh_runs import artifact_params, find_refresh, mark_reused, record_outcome
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.artifacts.tracking.terms import Status


@dataclass
class RunRecord:
    """The MLflow run of one flow run. Stages that run concurrently open it once."""

    tracking: Tracking
    name: str
    params: Mapping[str, Any]
    data: Collection[str] = ()  # nodes whose artifacts are the run's data sets
    _id: str | None = None
    _building: bool = False  # a stage was built, so that no earlier run has the same artifacts
    _earlier: str | None = None  # the finished run that has the same artifacts
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def open(self) -> str | None:
        """Return the run's id for a stage that is to be built; None if MLflow failed: the next call tries again."""
        self._building = True
        return self._open()

    def find_or_open(self, artifacts: Mapping[str, ArtifactRef]) -> str | None:
        """Return the id of this run, or of the earlier one that has the very same artifacts.

        Returns None if MLflow failed: the next call tries again.
        """
        if not self._building and self._id is None and self._earlier is None:
            self._earlier = find_refresh(self.tracking, self.name, artifacts)
        return self._earlier or self._open()

    def _open(self) -> str | None:
        with self._lock:
            if self._id is None:
                self._id = self.tracking.open_refresh(self.name, self.params)
            return self._id

    def close(
        self,
        status: Status,
        artifacts: Mapping[str, ArtifactRef],
        metrics: Mapping[str, float],
        files: Iterable[Path],
        tags: Mapping[str, str],
        *,
        concluded: bool = False,
    ) -> None:
        """End the run. One that failed before its first stage was built leaves none in MLflow.

        An earlier run with the same artifacts is only tagged as reused, unless it ended without a conclusion
        (`--until`) and this one is `concluded`.
        """
        if self._earlier is not None:
            if concluded:
                record_outcome(self.tracking, self._earlier, artifacts, metrics, tags)
            mark_reused(self.tracking, self._earlier)
        else:
            inputs = {name: artifacts[name] for name in self.data if name in artifacts}
            self.tracking.close_refresh(status, metrics, files, tags, inputs, artifact_params(artifacts))
