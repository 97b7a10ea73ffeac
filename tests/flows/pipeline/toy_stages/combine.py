"""Toy stage `combine`: a sum of the numbers of one or two artifacts."""

from __future__ import annotations

import json
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.contract import Config, Stage, StageContext


class CombineConfig(Config):
    factor: int = 1
    note_start: Path | None = None


def run(context: StageContext, config: CombineConfig) -> None:
    if config.note_start is not None:
        with config.note_start.open("a") as stream:
            stream.write("started\n")
    total = sum(sum(json.loads((folder / "numbers.json").read_text())) for folder in context.inputs.values())
    (context.out / "numbers.json").write_text(json.dumps([config.factor * total]))
    context.summary(total=config.factor * total)


def preflight(config: CombineConfig, _target: Path) -> None:
    if config.factor == 0:
        raise DraftsmithError("factor: 0 makes every sum 0: use another factor")


STAGE = Stage(name="combine", config=CombineConfig, inputs=("first", "second?"), run=run, preflight=preflight)
