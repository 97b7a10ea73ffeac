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
from draftsmith.stages.data.logs.earlier import TABLE, EarlierConfig
from draftsmith.stages.data.logs.stage import STAGE, LogsConfig
from draftsmith.stages.target.info import read_target_info
from tests.stages.data.row_files import write
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts

__all__ = ["write"]
Row = dict[str, Any]


def run(
    folder: Path,
    made: DrafterArtifacts,
    *paths: Path | str,
    prompts: bool = False,
    stop: bool = False,
    seed: int = 0,
    inputs: Mapping[str, Path] | None = None,
    **config: Any,
) -> RecordingContext:
    inputs = {"target": made.target, **({"prompts": made.prompts} if prompts else {}), **(inputs or {})}
    ctx = RecordingContext.under(folder / "run", inputs, seed)
    ctx.stop = stop
    STAGE.run(ctx, LogsConfig.model_validate({"paths": [str(p) for p in paths], "temperature": 0, **config}))
    return ctx


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
        return run(self.folder / f"run-{self.runs}", self.made, *files, **config)

    def earlier(self, before: RecordingContext, *, replayed: bool = False) -> Path:
        """Run stage `earlier` on the answers of the refresh before; return its artifact."""
        ctx = RecordingContext.under(self.folder / f"earlier-{self.runs}", {})
        sha256 = sha256_file(before.out / TABLE)
        of = given_by(before.inputs["target"])
        EARLIER.run(ctx, EarlierConfig(folder=str(before.out), sha256=sha256, replayed=replayed, **of))
        return ctx.out


def table(ctx: RecordingContext) -> list[Row]:
    return read_table(ctx.out / "trajectories.parquet", TRAJECTORIES).to_pylist()


def set_aside(ctx: RecordingContext) -> list[Row]:
    return [json.loads(line) for line in (ctx.out / "set_aside.jsonl").read_text().splitlines()]


def counts(ctx: RecordingContext) -> Row:
    found: Row = json.loads((ctx.out / "logs.json").read_text())
    return found


def as_ids(row: Row) -> Row:
    return {"prompt_token_ids": row["prompt_ids"], "completion_token_ids": row["response_ids"]}
