"""Runs stage `prompts` on rows that a test writes."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import PROMPTS
from draftsmith.stages.data.held_out import HELDOUT_SHARE, hash_fraction, prompt_identity
from draftsmith.stages.data.prompts.stage import STAGE, PromptsConfig
from tests.stages.data.row_files import write
from tests.testbed.context import RecordingContext

Row = dict[str, Any]


def of_classes(text: str, train: int, heldout: int) -> list[Row]:
    """Return this many prompts of the training class and of the held-out class, by the default `heldout_share`."""
    wanted, found = {False: train, True: heldout}, []
    for number in count():
        row = {"prompt": f"{text} {number}"}
        held_out = hash_fraction(prompt_identity([{"role": "user", "content": row["prompt"]}])) < HELDOUT_SHARE
        if wanted[held_out] > 0:
            wanted[held_out] -= 1
            found.append(row)
        if not any(wanted.values()):
            break
    return found


def questions(path: Path, number: int) -> Path:
    return write(path, [{"prompt": f"Question number {index}?"} for index in range(number)])


def run(target: Path, folder: Path, sources: list[Row] | Path, run_seed: int = 0, **settings: Any) -> list[Row]:
    """Return the rows that the stage writes in `folder`."""
    rows, _context = run_with_context(target, folder, sources, run_seed, **settings)
    return rows


def run_with_context(
    target: Path, folder: Path, sources: list[Row] | Path, run_seed: int = 0, **settings: Any
) -> tuple[list[Row], RecordingContext]:
    if isinstance(sources, Path):
        sources = [{"kind": "jsonl", "path": str(sources)}]
    config = PromptsConfig.model_validate({"sources": sources, "train": 2, "heldout": 1, **settings})
    context = RecordingContext.under(folder, {"target": target}, run_seed)
    STAGE.run(context, config)
    return read_table(context.out / "prompts.parquet", PROMPTS).to_pylist(), context


def error(target: Path, folder: Path, sources: list[Row] | Path, **settings: Any) -> str:
    with pytest.raises(DraftsmithError) as caught:
        run(target, folder, sources, **settings)
    text = str(caught.value)
    assert "\n" not in text
    assert not (folder / "out" / "prompts.parquet").exists()
    return text


def texts(rows: list[Row], split: str) -> set[str]:
    return {json.dumps(row["messages"]) for row in rows if row["split"] == split}
