"""Stage contexts for tests: one records the reports of the stage, one interrupts it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from draftsmith.artifacts.errors import StageInterrupted
from draftsmith.stages.runtime.stage import Stage


@dataclass
class RecordingContext:
    """A `StageContext` that records all reports; it creates `out` and `work`."""

    out: Path
    work: Path
    inputs: Mapping[str, Path] = field(default_factory=dict)
    seed: int = 0
    logs: list[str] = field(default_factory=list)
    progressed: list[tuple[int, int, str]] = field(default_factory=list)
    measured: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    summaries: dict[str, float] = field(default_factory=dict)
    shards: Sequence[Path] = ()
    earlier: Path | None = None
    stop: bool = False  # set it to ask the stage to stop

    def __post_init__(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)

    @classmethod
    def under(cls, folder: Path, inputs: Mapping[str, Path] | None = None, seed: int = 0, **fields: Any) -> Self:
        """Return a context with `folder/out` and `folder/work`."""
        return cls(folder / "out", folder / "work", dict(inputs or {}), seed, **fields)

    def run(self, stage: Stage, /, **config: Any) -> Self:
        """Run the stage with these fields of its config."""
        stage.run(self, stage.config.model_validate(config))
        return self

    def json(self, name: str) -> Any:
        """Return the content of a JSON file in `out`."""
        return json.loads((self.out / name).read_text())

    def log(self, message: str) -> None:
        self.logs.append(message)

    def progress(self, done: int, total: int, unit: str, **metrics: float) -> None:  # noqa: ARG002
        self.progressed.append((done, total, unit))

    def metrics(self, step: int, **values: float) -> None:
        self.measured.append((step, values))

    def rewind_metrics(self, step: int) -> None:
        self.measured = [entry for entry in self.measured if entry[0] < step]

    def summary(self, **values: float) -> None:
        self.summaries.update(values)

    @property
    def interrupted(self) -> bool:
        return self.stop

    def check_interrupted(self) -> None:
        if self.stop:
            raise StageInterrupted("asked to stop")


@dataclass
class StoppingContext(RecordingContext):
    """Asks the stage to stop, or calls `act`, once when `stop_after` of `unit` are done."""

    stop_after: int | None = None  # 0: at the first progress; None: never
    unit: str | None = None  # None: any unit
    act: Callable[[], None] | None = None  # instead of asking it to stop

    def progress(self, done: int, total: int, unit: str, **metrics: float) -> None:
        super().progress(done, total, unit, **metrics)
        if self.stop_after is None or done < self.stop_after or self.unit not in (None, unit):
            return
        self.stop_after = None
        if self.act is None:
            self.stop = True
        else:
            self.act()
