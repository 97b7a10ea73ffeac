"""What an interrupted reading of prompts or logs does not tokenise again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import StageInterrupted
from draftsmith.stages import logs, prompts
from draftsmith.stages.prompting.logged import Reader
from draftsmith.stages.prompting.tokenised import Tokenised
from tests.stages.logs_run import write
from tests.stages.prompts_run import of_classes, write_rows
from tests.testbed.context import StoppingContext
from tests.testbed.drafter import DrafterArtifacts


def test_prompts_that_were_tokenised_are_read_back(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = prompts.token_ids

    def counted(tokenizer: Any, candidate: Any, kwargs: Any) -> list[int]:
        seen.append(candidate.text_hash)
        return real(tokenizer, candidate, kwargs)

    monkeypatch.setattr(prompts, "token_ids", counted)
    rows = write_rows(tmp_path / "rows.jsonl", of_classes("What is", 150, 10))
    settings = {"sources": [{"kind": "jsonl", "path": str(rows)}], "train": 140, "heldout": 8}
    config = prompts.PromptsConfig.model_validate(settings)

    def run(name: str, stop_after: int | None) -> StoppingContext:
        context = StoppingContext.under(tmp_path / name, {"target": tiny_drafter.target}, stop_after=stop_after)
        prompts.STAGE.run(context, config)
        return context

    with pytest.raises(StageInterrupted):
        run("cut", 64)
    first = len(seen)
    again = run("cut", None)
    assert len(seen) == len(set(seen)) == 148
    assert f"{first} prompts were tokenised by an earlier attempt" in again.logs
    whole = run("whole", None)
    for file in ("prompts.parquet", "prompts.json", "set_aside.jsonl"):
        assert (again.out / file).read_bytes() == (whole.out / file).read_bytes()


def test_answers_that_were_tokenised_are_read_back_bad_rows_among_them(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    real = Reader._tokenised

    def counted(self: Reader, row: Any, messages: Any, completion: str) -> Any:
        seen.append(row.where)
        return real(self, row, messages, completion)

    monkeypatch.setattr(Reader, "_tokenised", counted)
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
        context = StoppingContext.under(
            tmp_path / name, {"target": tiny_drafter.target}, stop_after=stop_after, unit="rows"
        )
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


def test_a_text_that_could_not_be_tokenised_is_tried_again_and_the_others_are_kept(tmp_path: Path) -> None:
    def refuses() -> Any:
        raise ValueError("refused")

    for attempt in (1, 2):
        with Tokenised(tmp_path) as kept:
            for number in range(3):
                if number == 1:
                    with pytest.raises(ValueError, match="refused"):
                        kept.of("1", refuses)
                else:
                    made = kept.of(str(number), lambda n=number: ([n], [n + 1], ""))  # type: ignore[misc]
                    assert made == ([number], [number + 1], "")
        assert kept.kept == (2 if attempt == 2 else 0)
