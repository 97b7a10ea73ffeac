"""Toy stage `combine`: the sum of the numbers of one or two artifacts."""

from __future__ import annotations

import json
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.listing import list_files
from draftsmith.stages.data.row_files import local_files
from draftsmith.stages.runtime.stage import Config, InputListing, Stage, StageContext


class CombineConfig(Config):
    factor: int = 1
    note_start: Path | None = None
    allow: Path | None = None  # a user's error unless this file exists
    addend: Path | None = None  # a file outside the store with a number
    addends: str | None = None  # a pattern of such files

    def list_files(self) -> InputListing | None:
        return list_files([self.addends], "addends", []) if self.addends is not None else None

    def external_files(self) -> list[Path]:
        several = local_files([self.addends], "addends", self.pinned_files) if self.addends is not None else []
        return several if self.addend is None else [self.addend, *several]


def run(context: StageContext, config: CombineConfig) -> None:
    if config.note_start is not None:
        with config.note_start.open("a") as stream:
            stream.write("started\n")
    if config.allow is not None and not config.allow.exists():
        raise DraftsmithError(f"{config.allow} is missing: make it")
    total = sum(sum(json.loads((folder / "numbers.json").read_text())) for folder in context.inputs.values())
    for path in config.external_files():
        total += int(path.read_text())
        (context.work / "total").write_text(str(total))
    (context.out / "numbers.json").write_text(json.dumps([config.factor * total]))
    context.summary(total=config.factor * total)


def preflight(config: CombineConfig, _target: Path) -> None:
    if config.factor == 0:
        raise DraftsmithError("factor: 0 makes every sum 0: use another factor")


STAGE = Stage(
    name="combine",
    config=CombineConfig,
    inputs=("first", "second?"),
    body=__name__,
    preflight=preflight,
    reads_volatile=("first",),
)
