"""`draftsmith check` reads the logs of a run: what can be used, what is set aside, and when that is an error."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from draftsmith.flows.checks import prompts as checks
from draftsmith.flows.checks.findings import Findings, Level
from draftsmith.flows.pipeline.graph import Node
from draftsmith.stages.contract import Listing
from draftsmith.stages.logs import LogsConfig
from draftsmith.stages.prompts import PromptsConfig
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.targets.metadata import metadata_artifact

GOOD = {
    "messages": [{"role": "user", "content": "tell a story"}],
    "completion": "once upon a time .",
    "finish_reason": "stop",
}


@pytest.fixture(scope="module")
def metadata(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is known of the target without its weights."""
    folder = tmp_path_factory.mktemp("metadata")
    metadata_artifact(TargetConfig(source=str(tiny_target)), folder)
    return folder


def found(metadata: Path | None, path: Path, rows: list[Any], **config: Any) -> tuple[Level, str]:
    (line,) = all_found(metadata, path, rows, **config).lines
    assert line.check == "logs"
    return line.level, line.text


def all_found(metadata: Path | None, path: Path, rows: list[Any], **config: Any) -> Findings:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    os.utime(path, (0, 0))
    node = Node("logs", "draftsmith.stages.logs", LogsConfig(paths=[str(path)], temperature=0, **config))
    findings = Findings()
    checks.check_logs(findings, [node], metadata)
    return findings


def sources_found(path: Path, **asked: Any) -> Findings:
    """Of prompts from these files, which nobody writes any more."""
    for each in path.iterdir() if path.is_dir() else [path]:
        os.utime(each, (0, 0))
    sources = asked.pop("sources", [{"kind": "jsonl", "path": str(path)}])
    config, findings = PromptsConfig.model_validate({"sources": sources, **asked}), Findings()
    checks.check_sources(findings, [Node("prompts", "draftsmith.stages.prompts", config)])
    return findings


def answer(number: int, **more: Any) -> dict[str, Any]:
    return GOOD | {"completion": f"once upon a time {'the cat ' * number}."} | more


def asks(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"tell story {number}"}]


def test_good_logs_are_counted(metadata: Path, tmp_path: Path) -> None:
    rows = [answer(number) for number in range(9)]
    level, text = found(metadata, tmp_path / "a.jsonl", [*rows, answer(20, temperature=1)])
    assert level is Level.OK and "9 of all 10 rows can be used" in text
    rows = [answer(number, temperature=number % 2) for number in range(10)]
    level, text = found(metadata, tmp_path / "a.jsonl", rows)
    assert level is Level.WARNING and "5 of all 10 rows can be used" in text


def test_images_are_told_without_the_tokenizer_too(tmp_path: Path) -> None:
    seen = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}
    ids = {"prompt_token_ids": [5, 6], "completion_token_ids": [7, 8]}
    _, text = found(None, tmp_path / "a.jsonl", [ids, ids | seen, GOOD | seen])
    assert "1 of all 3 rows can be used; not used: 2 images or other parts of messages that are not text" in text


@pytest.mark.parametrize(("count", "level"), [(1, Level.OK), (9, Level.WARNING)])
def test_rows_that_cannot_be_prompts_are_told(count: int, level: Level, tmp_path: Path) -> None:
    rows: list[Any] = [{"messages": GOOD["messages"], "tools": [{"type": "function"}]} for _ in range(count)]
    rows += [{"prompt_token_ids": [5, 6, number], "messages": asks(number)} for number in range(9)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    told, enough = sources_found(path, train=4, heldout=0).lines
    assert (told.level, enough.level) == (level, Level.OK)
    assert f"{count} of {count + 9} rows cannot be prompts" in told.text and "9 rows for 4 prompts" in enough.text


def test_only_the_files_that_a_run_reads_are_counted(tmp_path: Path) -> None:
    for name in "ab":
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(answer(1, messages=asks(number))) + "\n" for number in range(5)))
        os.utime(path, (0, 0))
    asked = {"sources": [{"kind": "jsonl", "path": str(tmp_path)}], "train": 4, "heldout": 0}
    config, findings = PromptsConfig.model_validate(asked).reading(Listing([str(tmp_path / "a.jsonl")], {})), Findings()
    checks.check_sources(findings, [Node("prompts", "draftsmith.stages.prompts", config)])
    (enough,) = findings.lines
    assert "5 rows for 4 prompts" in enough.text


def test_a_prompt_that_comes_again_is_counted_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Question {number % 5}?"}) + "\n" for number in range(60)))
    line = sources_found(path, train=20, heldout=2).lines[-1]
    assert line.level is Level.ERROR and "without 55 duplicates: 5 rows" in line.text


@pytest.mark.parametrize("field", ["question", "prompt"])
def test_a_data_set_here_has_the_field_that_is_asked_for(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    (folder := tmp_path / "data").mkdir()
    (folder / "a.jsonl").write_text("".join(json.dumps({"question": f"{number}?"}) + "\n" for number in range(40)))
    source = {"kind": "huggingface", "id": str(folder), "split": "train", "field": field}
    findings = sources_found(folder, sources=[source], train=20, heldout=2)
    assert len(findings.remarks) == (field == "prompt") and findings.errors == 0


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([answer(1, temperature=1)], "0 of all 1 rows can be used; not used: 1 another temperature"),
        (['{"messages": '], "row 1: not JSON"),
        ([], "a.jsonl: is empty"),
    ],
)
def test_nothing_that_can_be_used_is_an_error(rows: list[Any], said: str, metadata: Path, tmp_path: Path) -> None:
    level, text = found(metadata, tmp_path / "a.jsonl", rows)
    assert level is Level.ERROR and said in text


def test_a_window_is_no_fault_of_its_rows(metadata: Path, tmp_path: Path) -> None:
    rows = [answer(number, time=f"2026-03-0{number}") for number in range(1, 10)]
    level, text = found(metadata, tmp_path / "a.jsonl", rows, since="2026-03-08")
    assert level is Level.OK and text == "2 of all 9 rows can be used; not used: 7 outside the window"


def test_rows_of_another_model_are_told_and_left_out_by_a_filter(metadata: Path, tmp_path: Path) -> None:
    rows = [answer(number, model="ours" if number % 3 else "theirs") for number in range(9)]
    path = tmp_path / "a.jsonl"
    findings = all_found(metadata, path, rows)
    told, counted = findings.lines
    assert told.level is Level.WARNING and "2 models (6 of ours, 3 of theirs): `logs.filter: {model: …}`" in told.text
    assert counted.text == "9 of all 9 rows can be used"
    level, text = found(metadata, path, rows, filter={"model": "ours"})
    assert level is Level.OK and text == "6 of all 9 rows can be used; not used: 3 not let through by filter"
    level, text = found(metadata, path, rows, filter={"modell": "ours"})
    assert level is Level.ERROR and "no field modell to filter by: correct filter, its fields are completion," in text


def test_text_that_does_not_say_how_it_ended_is_told(metadata: Path, tmp_path: Path) -> None:
    rows = [answer(number, finish_reason=None if number < 5 else "length") for number in range(9)]
    told, counted = all_found(metadata, tmp_path / "a.jsonl", rows).lines
    assert told.level is Level.WARNING and told.text.startswith("5 of 9 rows are text without a finish_reason")
    assert counted.text == "9 of all 9 rows can be used"
    ids = [{"prompt_token_ids": [5, number], "completion_token_ids": [7, 8]} for number in range(9)]
    assert found(metadata, tmp_path / "a.jsonl", ids)[0] is Level.OK


def test_only_the_first_rows_of_a_long_log_are_read(
    metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_LOG_ROWS", 5)
    rows = [answer(number) for number in range(9)]
    assert found(metadata, tmp_path / "a.jsonl", rows) == (Level.OK, "5 of the first 5 rows can be used")
    level, text = found(metadata, tmp_path / "b.jsonl", [answer(1, temperature=1)] * 9)
    assert level is Level.WARNING and "0 of the first 5 rows can be used" in text  # the rest may be of use


def test_without_a_tokenizer_shape_temperature_and_time_are_judged(tmp_path: Path) -> None:
    rows = [*[answer(number) for number in range(8)], answer(1, temperature=1), {"prompt_token_ids": [1]}]
    level, text = found(None, tmp_path / "a.jsonl", rows, max_bad_share=0.1)
    assert level is Level.OK and "8 of all 10 rows can be used" in text


@pytest.mark.parametrize("of_logs", [True, False])
def test_a_file_that_may_still_be_written_is_named(of_logs: bool, tmp_path: Path) -> None:
    """A stage that reads it would fail at its end."""
    for name in ("old", "a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(answer(number)) + "\n" for number in range(40)))
    os.utime(tmp_path / "old.jsonl", (0, 0))
    sources = [{"kind": "jsonl", "path": str(tmp_path)}]
    prompts = PromptsConfig.model_validate({"sources": sources, "train": 0, "heldout": 1, "heldout_share": 1})
    logs = LogsConfig(paths=[str(tmp_path)], temperature=0)
    findings = Findings()
    if of_logs:
        checks.check_logs(findings, [Node("logs", "draftsmith.stages.logs", logs)], None)
    else:
        checks.check_sources(findings, [Node("prompts", "draftsmith.stages.prompts", prompts)])
    (said,) = findings.remarks
    assert f"{tmp_path}/a.jsonl and 1 more: written to within the last 30 s. A file that grows while a stage" in said


def test_what_was_read_before_is_nothing_new(tmp_path: Path) -> None:
    """A window of `since: last` reaches back behind the newest row that was read."""
    rows = [answer(number, time=f"2026-03-01T{number:02}:30:00Z") for number in range(1, 10)]
    window: dict[str, Any] = {"since": "last", "after": rows[-1]["time"]}
    level, text = found(None, tmp_path / "a.jsonl", rows, **window)
    assert level is Level.WARNING and "no row is later than 2026-03-01T09:30:00Z: without new ones, only a" in text
    level, text = found(None, tmp_path / "a.jsonl", [*rows, answer(10, time="2026-03-01T09:30:01Z")], **window)
    assert level is Level.OK and text.startswith("2 of all 10 rows can be used; not used: 8 outside the window")


def test_a_bad_row_is_a_part_of_its_window(tmp_path: Path) -> None:
    rows: list[Any] = [answer(1, time="2026-03-01")] * 90 + [answer(1, time="2026-03-08")] * 8
    level, text = found(None, tmp_path / "a.jsonl", [*rows, *["{", "{"]], since="2026-03-08", max_bad_share=0.1)
    assert level is Level.ERROR and "(2 of 10 rows inside the window cannot be read, over logs.max_bad_s" in text


@pytest.mark.parametrize("window", [{"since": "2026-03-02"}, {"since": "last", "after": "2026-03-01T09:30:00Z"}])
def test_later_rows_may_follow_those_that_are_looked_at(
    window: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log that is appended to begins with its oldest rows."""
    monkeypatch.setattr(checks, "_LOG_ROWS", 5)
    old, new = ([answer(number, time=f"2026-03-0{day}") for number in range(6)] for day in (1, 2))
    level, text = found(None, tmp_path / "a.jsonl", [*old, *new], **window)
    assert level is Level.SKIPPED and "0 of the first 5 rows can be used; not used: 5 outside the window" in text


@pytest.mark.parametrize("of_logs", [True, False])
@pytest.mark.parametrize(("text", "said"), [("", "is empty"), ("question,answer\nWhat?,That.\n", "not JSON")])
def test_a_file_without_rows_is_an_error_that_says_what_it_is(
    text: str, said: str, of_logs: bool, tmp_path: Path
) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    os.utime(tmp_path / "a.jsonl", (0, 0))
    findings = Findings()
    if of_logs:
        logs = LogsConfig(paths=[str(tmp_path / "a.jsonl")], temperature=0)
        checks.check_logs(findings, [Node("logs", "draftsmith.stages.logs", logs)], None)
    else:
        findings = sources_found(tmp_path / "a.jsonl", train=4, heldout=1)
    (line,) = findings.lines
    assert line.level is Level.ERROR and f"{tmp_path}/a.jsonl" in line.text and said in line.text


def test_rows_may_call_their_fields_otherwise(metadata: Path, tmp_path: Path) -> None:
    rows = [
        {"question": "tell a story", "reply": "once upon a time .", "why": "stop"},
        {"question": json.dumps(asks(2)), "reply": "once upon a time the cat .", "why": "stop", "completion": "no"},
    ]
    names = {"messages": "question", "completion": "reply", "finish_reason": "why"}
    assert found(metadata, tmp_path / "a.jsonl", rows, fields=names) == (Level.OK, "2 of all 2 rows can be used")
    level, text = found(metadata, tmp_path / "a.jsonl", rows, fields=names | {"completion": "answer"})
    assert level is Level.ERROR and "logs.fields" in text
