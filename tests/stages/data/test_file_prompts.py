"""Prompts of files: the same as with all rows in memory, with few of them there."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from draftsmith.stages.data import prompt_streams
from draftsmith.stages.data.chat_template import PromptCandidate
from draftsmith.stages.data.prompt_streams import PromptStream, open_streams
from draftsmith.stages.data.prompts import SPLITS, PromptsConfig
from tests.stages.data.prompts_run import Row, error, questions, run, run_with_context, write_rows


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """Return rows of four weeks: some repeated, some on several days, some without a date."""
    draw = random.Random(0)
    rows: list[Row] = []
    for number in range(400):
        days = [f"2026-03-{draw.randrange(1, 29):02}" for _ in range(draw.choice((1, 1, 1, 2, 9)))]
        rows += [{"prompt": f"Question {number}?", "time": day} for day in days]
        rows += [{"prompt": f"Question {number}?"}] * (number % 10 == 0)
    draw.shuffle(rows)
    return write_rows(tmp_path / "log.jsonl", rows)


def selected(log: Path, heldout: int, **config: Any) -> tuple[list[list[str]], PromptStream]:
    """Return all prompts that a stream gives to each split, opened for this many held-out prompts."""
    source = {"kind": "jsonl", "path": str(log), "since": config.pop("since", None)}
    config_of_log = PromptsConfig.model_validate({"sources": [source], "train": 0, "heldout": heldout, **config})
    (stream,) = open_streams(config_of_log.sources[0], config_of_log)
    return [[each.text_hash for each in iter(partial(stream.next, split), None)] for split in SPLITS], stream


@pytest.mark.parametrize(
    ("kept", "share", "since", "train"),
    [(1, 0.1, None, 1), (7, 0.1, "2026-03-20", 0), (256, 1.0, None, 0), (1, 1.0, "2026-03-20", 1)],
)
def test_prompts_do_not_depend_on_how_many_stay_in_memory(
    kept: int, share: float, since: str | None, train: int, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last prompt, with duplicates, and with the same counts of both classes."""
    monkeypatch.setattr(prompt_streams, "_MIN_KEPT", kept)
    plain, whole = selected(log, 10_000, train=train, heldout_share=share, since=since)
    few, stream = selected(log, 1, train=train, heldout_share=share, since=since)
    assert few == plain and len(plain[0]) > 50
    assert stream.class_counts == whole.class_counts
    assert stream.rejects is not None and whole.rejects is not None and stream.rejects.rows == whole.rejects.rows


def test_memory_is_bounded_by_the_needed_prompts(
    target: Path, tmp_path: Path, log: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_streams, "_MIN_KEPT", 8)
    most = 0
    cut = prompt_streams._drop_highest

    def watched(kept: dict[Any, PromptCandidate], *rest: Any) -> Any:
        nonlocal most
        most = max(most, len(kept))
        return cut(kept, *rest)

    monkeypatch.setattr(prompt_streams, "_drop_highest", watched)
    bounded = run(target, tmp_path / "1", log, train=0, heldout=12, validation=4, heldout_share=0.5)
    assert 64 < most <= 129, "four times the needed prompts, and as many again until they are sorted out"
    most = 0
    with_training = run(target, tmp_path / "2", log, train=1, heldout=12, validation=4, heldout_share=0.5)
    assert 128 < most <= 257, "of both classes twice as many"
    assert bounded == [row for row in with_training if row["split"] != "train"]


def test_rejected_rows_of_a_second_reading_are_not_listed_again(
    target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompt_streams, "_MIN_KEPT", 1)
    monkeypatch.setattr(prompt_streams, "_KEPT_PER_PROMPT", 0)
    path = questions(tmp_path / "a.jsonl", 100)
    with path.open("a") as file:
        file.write('{"prompt": "half')
    settings: dict[str, Any] = {"train": 0, "heldout_share": 0.5, "max_bad_share": 0.02}
    rows, context = run_with_context(target, tmp_path / "1", path, heldout=20, **settings)
    assert len(rows) == 20 and context.summaries["rows_set_aside"] == 1
    assert len((tmp_path / "1" / "out" / "set_aside.jsonl").read_text().splitlines()) == 1
    assert "of its 100 are of the held-out class" in error(target, tmp_path / "2", path, heldout=90, **settings)
