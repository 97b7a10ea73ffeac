"""Runs stage `logs` on rows that a test writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from draftsmith.artifacts.store.manifest import sha256_file
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.data.logs.earlier import STAGE as EARLIER
from draftsmith.stages.data.logs.earlier import TABLE
from draftsmith.stages.data.logs.filter import SchemaFilter
from draftsmith.stages.data.logs.stage import STAGE, LogsConfig
from draftsmith.stages.data.row_files import RejectLog
from draftsmith.stages.data.row_files import Row as FileRow
from draftsmith.stages.targets.info import read_target_info
from tests.stages.data.row_files import write
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts

__all__ = ["write"]
Row = dict[str, Any]


def run(
    folder: Path,
    target: Path,
    *paths: Path | str,
    seed: int = 0,
    inputs: Mapping[str, Path] | None = None,
    **config: Any,
) -> RecordingContext:
    ctx = RecordingContext.under(folder / "run", {"target": target, **(inputs or {})}, seed)
    return ctx.run(STAGE, **{"paths": [str(p) for p in paths], "temperature": 0, **config})


def schema_filter(max_bad_share: float = 0, **config: Any) -> SchemaFilter:
    """Return the filter of a log of greedy answers."""
    fields = {"paths": ["a"], "temperature": 0, **config}
    return SchemaFilter(LogsConfig.model_validate(fields), RejectLog("logs.max_bad_share", max_bad_share))


def accepted(row_filter: SchemaFilter, rows: Sequence[Row]) -> list[bool | None]:
    return [row_filter.accept(FileRow("log.jsonl", number, row)) for number, row in enumerate(rows, 1)]


def earlier(folder: Path, before: RecordingContext, *, replayed: bool = True) -> Path:
    """Run stage `earlier` in `folder` on the answers of the refresh before; return its artifact."""
    of = given_by(before.inputs["target"])
    fields = {"folder": str(before.out), "sha256": sha256_file(before.out / TABLE), "replayed": replayed, **of}
    return RecordingContext.under(folder).run(EARLIER, **fields).out


def given_by(target: Path) -> dict[str, str]:
    """Return the digests of the target that gave the answers, and of its tokenizer."""
    info = read_target_info(target)
    return {"target_digest": info.digest, "tokenizer_digest": info.tokenizer_digest}


@dataclass
class Logs:
    """Runs the stage for one test, each time in a new folder, on answers of the tiny target."""

    folder: Path
    made: DrafterArtifacts
    answers: list[Row]
    runs: int = 0

    def write(self, name: str, rows: Sequence[Row | str]) -> Path:
        return write(self.folder / name, rows)

    def run(self, *paths: Path | list[Row | str] | list[Row], **config: Any) -> RecordingContext:
        """Run the stage. paths: files, or rows to write to `log.jsonl`."""
        self.runs += 1
        files = [self.write("log.jsonl", each) if isinstance(each, list) else each for each in paths]
        return run(self.folder / f"run-{self.runs}", self.made.target, *files, **config)

    def earlier(self, before: RecordingContext, *, replayed: bool = False) -> Path:
        """Run stage `earlier` on the answers of the refresh before; return its artifact."""
        return earlier(self.folder / f"earlier-{self.runs}", before, replayed=replayed)


def table(ctx: RecordingContext) -> list[Row]:
    return read_table(ctx.out / "trajectories.parquet", TRAJECTORIES).to_pylist()


def set_aside(ctx: RecordingContext) -> list[Row]:
    return [json.loads(line) for line in (ctx.out / "set_aside.jsonl").read_text().splitlines()]


def counts(ctx: RecordingContext) -> Row:
    found: Row = json.loads((ctx.out / "logs.json").read_text())
    return found


def as_ids(row: Row) -> Row:
    return {"prompt_token_ids": row["prompt_ids"], "completion_token_ids": row["response_ids"]}
