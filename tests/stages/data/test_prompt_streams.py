"""Every prompt serves only the splits of its class, whatever the source, order and seed; few stay in memory."""

from __future__ import annotations

import json
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from draftsmith.stages.data.chat_template import PromptCandidate
from draftsmith.stages.data.held_out import HELDOUT_SHARE, hash_fraction, prompt_identity
from draftsmith.stages.data.prompts import streams as prompt_streams
from draftsmith.stages.data.prompts.stage import SPLITS, PromptsConfig
from draftsmith.stages.data.prompts.streams import PromptStream, open_streams
from tests.stages.data.prompts_run import Row, error, of_classes, questions, run, run_with_context, texts
from tests.stages.data.row_files import write


def measured(rows: list[Row]) -> set[bytes]:
    return {prompt_identity(row["messages"]) for row in rows if row["split"] != "train"}


def trained(rows: list[Row]) -> set[bytes]:
    return {prompt_identity(row["messages"]) for row in rows if row["split"] == "train"}


def test_no_refresh_trains_on_held_out_prompts_of_another(target: Path, tmp_path: Path) -> None:
    """With other seeds, counts, files, system prompts and tasks, a text stays in its class."""
    path = questions(tmp_path / "a.jsonl", 300)
    data = tmp_path / "data"
    data.mkdir()
    questions(data / "train.jsonl", 300)
    seen: list[list[Row]] = []
    for seed in range(3):
        sources: list[Row] = [
            {"kind": "jsonl", "path": str(path)},
            {"kind": "huggingface", "id": str(data), "field": "prompt"},
            {"kind": "reasoning_gym", "tasks": ["chain_sum"]},
        ]
        settings: dict[str, Any] = {"train": 60 + 90 * seed, "heldout": 12, "validation": 6, "seed": seed}
        settings["system"] = f"Be kind {seed}."
        seen.append(run(target, tmp_path / str(seed), sources, **settings))
    assert not set().union(*map(measured, seen)) & set().union(*map(trained, seen))
    assert all(hash_fraction(prompt) < HELDOUT_SHARE for rows in seen for prompt in measured(rows))


def test_a_growing_file_keeps_its_held_out_prompts(target: Path, tmp_path: Path) -> None:
    few, many = questions(tmp_path / "a.jsonl", 200), questions(tmp_path / "b.jsonl", 240)
    first, later = (
        texts(run(target, tmp_path / path.stem, path, train=5, heldout=12), "heldout") for path in (few, many)
    )
    assert len(first & later) >= 7  # all but those that new rows came before


def test_a_too_small_class_is_an_error_with_a_remedy(target: Path, tmp_path: Path) -> None:
    path = questions(tmp_path / "a.jsonl", 100)
    text = error(target, tmp_path, path, train=20, heldout=50)
    held_out = sum(
        hash_fraction(prompt_identity([{"role": "user", "content": f"Question number {number}?"}])) < HELDOUT_SHARE
        for number in range(100)
    )
    assert f"{held_out} of its 100 are of the held-out class, heldout_share 0.1" in text
    assert "raise heldout_share" in text
    narrow = run(target, tmp_path / "1", path, train=20, heldout=held_out)
    wide = run(target, tmp_path / "2", path, train=20, heldout=30, heldout_share=0.5)
    assert not measured(narrow) & trained(wide)
    summary = json.loads((tmp_path / "2" / "out" / "prompts.json").read_text())
    assert summary["heldout_share"] == 0.5


def test_a_benchmark_may_be_held_out_as_a_whole(target: Path, tmp_path: Path) -> None:
    """None of it is trained on, even if another source has it with another system prompt."""
    benchmark = questions(tmp_path / "a.jsonl", 20)
    kind = {"role": "system", "content": "Be kind."}
    questions_asked = [[kind, {"role": "user", "content": f"Question number {number}?"}] for number in range(30)]
    other = write(tmp_path / "b.jsonl", [{"messages": messages} for messages in questions_asked])
    sources: list[Row] = [
        {"kind": "jsonl", "path": str(benchmark), "heldout_share": 1, "counts": {"heldout": 20}},
        {"kind": "jsonl", "path": str(other), "counts": {"train": 7}},
    ]
    rows = run(target, tmp_path, sources, train=None, heldout=None)
    assert len(measured(rows)) == 20 and len(trained(rows)) == 7
    assert not measured(rows) & trained(rows)


def test_logged_token_ids_stay_the_prompt(target: Path, tmp_path: Path) -> None:
    as_text = run(target, tmp_path / "1", questions(tmp_path / "a.jsonl", 60), train=20, heldout=4, heldout_share=0.2)
    logged = [{"prompt_token_ids": row["token_ids"], "completion_token_ids": [1, 2]} for row in as_text]
    log = write(tmp_path / "log.jsonl", [*logged, {"prompt_token_ids": []}, {"prompt_token_ids": [10**6]}])
    rows = run(target, tmp_path / "2", log, train=20, heldout=4, heldout_share=0.2, max_bad_share=0.1)
    assert {tuple(row["token_ids"]) for row in rows} == {tuple(row["token_ids"]) for row in as_text}
    assert measured(rows) == measured(as_text), "of one class as text and as ids"
    listed = [
        json.loads(line)["reason"] for line in (tmp_path / "2" / "out" / "set_aside.jsonl").read_text().splitlines()
    ]
    assert "prompt_token_ids is empty" in listed[0] and "outside the target's vocabulary" in listed[1]
    (with_suffix, *_) = run(
        target, tmp_path / "3", [{"kind": "jsonl", "path": str(log), "suffix": " Explain."}],
        train=1, heldout=1, max_bad_share=0.1, heldout_share=0.5,
    )  # fmt: skip
    assert with_suffix["messages"][-1]["content"].endswith(" Explain.")
    assert with_suffix["token_ids"] not in [row["token_ids"] for row in as_text]


def test_rows_in_the_window_come_first_then_the_newest_others(target: Path, tmp_path: Path) -> None:
    days = [f"2026-03-{day:02}" for day in range(1, 29)]
    rows = [{"prompt": f"Question {number} of {day}", "when": day} for day in days for number in range(3)]
    path = write(tmp_path / "log.jsonl", [*rows, {"prompt": "Question without a day"}])

    def selected(count: int, since: str | None) -> list[str]:
        source = {"kind": "jsonl", "path": str(path), "since": since, "fields": {"timestamp": "when"}}
        found = run(target, tmp_path / f"{count}-{since}", [source], train=0, heldout=count, heldout_share=1)
        return [row["messages"][0]["content"][-10:] for row in found]

    assert set(selected(9, "2026-03-26")) == set(days[25:])
    assert [*dict.fromkeys(selected(15, "2026-03-26")[9:])] == [days[24], days[23]], "then the newest of the others"
    assert selected(85, "2026-03-26")[-1] == "hout a day"
    assert len(set(selected(9, None))) > 3


def test_bad_rows_are_rejected_up_to_a_share(target: Path, tmp_path: Path) -> None:
    bad: list[Any] = [{"text": "no prompt"}, {"prompt": "half a pair \ud83d"}]
    path = write(tmp_path / "a.jsonl", [*[{"prompt": f"Question {number}"} for number in range(97)], *bad])
    with path.open("a") as file:
        file.write('{"prompt": "half')
    rows, context = run_with_context(target, tmp_path, path, max_bad_share=0.03)
    assert len(rows) == 3 and context.summaries["rows_set_aside"] == 3
    listed = [json.loads(line) for line in (tmp_path / "out" / "set_aside.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["row"]) for entry in listed] == [(str(path), 98), (str(path), 99), (str(path), 100)]
    assert "3 of 100 rows cannot be read, over prompts.max_bad_share 0.02" in error(
        target, tmp_path / "2", path, max_bad_share=0.02
    )
    text = error(target, tmp_path / "3", path, max_bad_share=0)
    assert text.startswith(f"{path}, row 98: none of the shapes") and "Set the source's field" in text


@pytest.mark.parametrize(
    "bad", [{"prompt": "Why?", "language": "half a pair \ud83d"}, {"turns": ["Why?", "And half a pair \ud83d?"]}]
)
def test_a_row_whose_label_or_further_question_is_not_unicode_is_named(bad: Row, target: Path, tmp_path: Path) -> None:
    good = [row | {"language": "de"} for row in of_classes("Question", 2, 1)]
    path = write(tmp_path / "a.jsonl", [bad, *good])
    text = error(target, tmp_path / "1", path, slices=["language"], max_bad_share=0)
    assert text == f"{path}, row 1: not valid Unicode (half a surrogate pair): correct the row"
    assert len(run(target, tmp_path / "2", path, slices=["language"], max_bad_share=0.4)) == 3


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
    return write(tmp_path / "log.jsonl", rows)


def given_to_each(log: Path, heldout: int, **config: Any) -> tuple[list[list[str]], PromptStream]:
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
    plain, whole = given_to_each(log, 10_000, train=train, heldout_share=share, since=since)
    few, stream = given_to_each(log, 1, train=train, heldout_share=share, since=since)
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
