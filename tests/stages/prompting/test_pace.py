"""A long reading of rows says how far it is, and stops when it is asked to, wherever it is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import StageInterrupted
from draftsmith.stages import logs, prompts
from draftsmith.stages.prompting import pace
from draftsmith.stages.prompting.earlier import ORIGIN
from tests.stages.logs_run import given_by, write
from tests.stages.prompts_run import Row, of_classes, write_rows
from tests.testbed.context import StoppingContext
from tests.testbed.drafter import DrafterArtifacts


@pytest.mark.parametrize(("unit", "done"), [("rows counted", 3), ("rows", 3)])
def test_logs_of_large_rows_are_left_between_two_of_them(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch, unit: str, done: int
) -> None:
    monkeypatch.setattr(pace, "_EVERY_S", 0.0)  # as if every row took a second
    rows: list[Any] = [{"prompt_token_ids": [5, 6, number], "completion_token_ids": [8, 9]} for number in range(20)]
    settings = {"paths": [str(write(tmp_path / "log.jsonl", rows))], "temperature": 0, "scored": 0}
    context = StoppingContext.under(tmp_path, {"target": tiny_drafter.target}, stop_after=done, unit=unit)
    with pytest.raises(StageInterrupted):
        logs.STAGE.run(context, logs.LogsConfig.model_validate(settings))
    assert context.progressed[-1] == (done, done if unit == "rows counted" else 20, unit)


def test_answers_of_an_earlier_refresh_are_left_where_it_is_asked_for(
    tmp_path: Path, tiny_drafter: DrafterArtifacts
) -> None:
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    shutil.copy(tiny_drafter.rollout / "trajectories.parquet", earlier)
    (earlier / ORIGIN).write_text(json.dumps(given_by(tiny_drafter.target)))
    row = {"prompt_token_ids": [5, 6, 7], "completion_token_ids": [8, 9]}
    settings = {"paths": [str(write(tmp_path / "log.jsonl", [row]))], "temperature": 0, "replay_share": 0.5}
    inputs = {"target": tiny_drafter.target, "earlier": earlier}
    context = StoppingContext.under(tmp_path, inputs, stop_after=0, unit="earlier answers")
    with pytest.raises(StageInterrupted):
        logs.STAGE.run(context, logs.LogsConfig.model_validate(settings))
    assert context.progressed[-1][2] == "earlier answers"


@pytest.mark.parametrize("train", [0, 2])
def test_a_file_of_prompts_says_how_far_it_is_before_the_first_is_taken(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch, train: int
) -> None:
    monkeypatch.setattr(pace, "_EVERY_S", 0.0)
    source: Row = {"kind": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl", of_classes("What is", 50, 5)))}
    config = prompts.PromptsConfig.model_validate({"sources": [source], "train": train, "heldout": 2})
    context = StoppingContext.under(tmp_path, {"target": tiny_drafter.target}, stop_after=0)
    with pytest.raises(StageInterrupted):
        prompts.STAGE.run(context, config)
    assert context.progressed == [(0, train + 2, "prompts")], "of the first row"
