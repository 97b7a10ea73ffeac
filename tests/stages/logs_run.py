"""The stage `logs` run on rows that a test writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from draftsmith.artifacts.manifest import sha256_file
from draftsmith.artifacts.parquet import read_table
from draftsmith.artifacts.schemas import TRAJECTORIES
from draftsmith.stages.earlier import STAGE as EARLIER
from draftsmith.stages.earlier import TABLE, EarlierConfig
from draftsmith.stages.logs import STAGE, LogsConfig
from draftsmith.stages.targets.info import read_target_info
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts

Row = dict[str, Any]


def write(path: Path, rows: Sequence[Row | str]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


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
    """Digests of the target that gave answers, and of its tokenizer."""
    info = read_target_info(target)
    return {"target_digest": info.digest, "tokenizer_digest": info.tokenizer_digest}


def earlier(folder: Path, before: RecordingContext, *, replayed: bool = False) -> Path:
    """Of stage `earlier`: what the refresh before has used."""
    ctx = RecordingContext.under(folder / "earlier", {})
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
