"""Reading many rows reports progress, stops when asked, and does not tokenise a log again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import StageInterrupted
from draftsmith.stages.data import prompts, row_files
from draftsmith.stages.data.logs import stage as logs
from draftsmith.stages.data.logs.rows import AnswerReader, TokenCache
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


def test_a_second_attempt_reads_tokenised_answers_back(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = AnswerReader._tokenised

    def counted(self: AnswerReader, row: Any, messages: Any, completion: str) -> Any:
        seen.append(row.where)
        return real(self, row, messages, completion)

    monkeypatch.setattr(AnswerReader, "_tokenised", counted)
    rows: list[Any] = [
        {"messages": [{"role": "user", "content": f"Say {number}."}], "completion": f"Here is {number} for you."}
        for number in range(600)
    ]
    rows[5] = {"messages": "no", "completion": "x"}
    rows[7]["completion"] = rows[300]["completion"] = "\ud800"
    rows[400] = {"prompt_token_ids": [5, 6, 7], "completion_token_ids": [8, 9, 10]}
    file = write(tmp_path / "logs.jsonl", rows)
    config = logs.LogsConfig.model_validate({"paths": [str(file)], "temperature": 0, "scored": 0, "max_bad_share": 0.1})

    def run(name: str, stop_after: int | None) -> StoppingContext:
        inputs = {"target": tiny_drafter.target}
        context = StoppingContext.under(tmp_path / name, inputs, stop_after=stop_after, unit="rows")
        logs.STAGE.run(context, config)
        return context

    with pytest.raises(StageInterrupted):
        run("cut", 256)
    first = len(seen)
    assert 250 < first <= 256
    again = run("cut", None)
    assert len(seen) == len(set(seen)) > 590
    assert f"{file}, row 8" in seen, "what is no text is looked at once too"
    assert f"{first} answers were tokenised by an earlier attempt" in again.logs
    whole = run("whole", None)
    for name in ("trajectories.parquet", "logs.json", "set_aside.jsonl"):
        assert (again.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_a_text_that_failed_to_tokenise_is_tried_again(tmp_path: Path) -> None:
    def refuses() -> Any:
        raise ValueError("refused")

    for attempt in (1, 2):
        with TokenCache(tmp_path) as cache:
            for number in range(3):
                if number == 1:
                    with pytest.raises(ValueError, match="refused"):
                        cache.get("1", refuses)
                else:
                    made = cache.get(str(number), lambda n=number: ([n], [n + 1], ""))  # type: ignore[misc]
                    assert made == ([number], [number + 1], "")
        assert cache.hits == (2 if attempt == 2 else 0)
