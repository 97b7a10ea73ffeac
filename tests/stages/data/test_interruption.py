"""Reading many rows reports progress and stops when asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import StageInterrupted
from draftsmith.stages.data import prompts, row_files
from draftsmith.stages.data.logs import stage as logs
from tests.stages.data.logs.logs_run import write
from tests.stages.data.prompts_run import of_classes, write_rows
from tests.testbed.context import StoppingContext
from tests.testbed.drafter import DrafterArtifacts


def test_reading_logs_stops_between_two_rows(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_files, "_REPORT_EVERY_S", 0.0)  # as if every row took a second
    rows: list[Any] = [{"prompt_token_ids": [5, 6, number], "completion_token_ids": [8, 9]} for number in range(20)]
    settings = {"paths": [str(write(tmp_path / "log.jsonl", rows))], "temperature": 0, "scored": 0}
    context = StoppingContext.under(tmp_path, {"target": tiny_drafter.target}, stop_after=3, unit="rows")
    with pytest.raises(StageInterrupted):
        logs.STAGE.run(context, logs.LogsConfig.model_validate(settings))
    assert context.progressed[-1] == (3, 3, "rows")


@pytest.mark.parametrize("train", [0, 2])
def test_progress_is_reported_before_the_first_prompt_is_selected(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch, train: int
) -> None:
    monkeypatch.setattr(row_files, "_REPORT_EVERY_S", 0.0)
    source = {"kind": "jsonl", "path": str(write_rows(tmp_path / "rows.jsonl", of_classes("What is", 50, 5)))}
    config = prompts.PromptsConfig.model_validate({"sources": [source], "train": train, "heldout": 2})
    context = StoppingContext.under(tmp_path, {"target": tiny_drafter.target}, stop_after=0)
    with pytest.raises(StageInterrupted):
        prompts.STAGE.run(context, config)
    assert context.progressed == [(0, train + 2, "prompts")], "of the first row"
