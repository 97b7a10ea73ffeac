"""`draftsmith check` reads logs and prompts: it counts usable rows, and reports why others are rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.flows.checks import logs as checks
from draftsmith.flows.checks import prompts
from draftsmith.flows.checks.findings import Findings, Level
from draftsmith.flows.checks.models import metadata_artifact
from draftsmith.stages.targets.config import TargetConfig
from tests.stages.data.row_files import write
from tests.testbed.refresh import node_of

GOOD = {
    "messages": [{"role": "user", "content": "tell a story"}],
    "completion": "once upon a time .",
    "finish_reason": "stop",
}


@pytest.fixture(scope="module")
def metadata(tiny_target: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a target artifact without weights."""
    folder = tmp_path_factory.mktemp("metadata")
    metadata_artifact(TargetConfig(source=str(tiny_target)), folder)
    return folder


def check_log(metadata: Path | None, path: Path, rows: list[Any], **config: Any) -> tuple[Level, str]:
    (line,) = check_logs(metadata, path, rows, **config).lines
    assert line.check == "logs"
    return line.level, line.text


def check_logs(metadata: Path | None, path: Path, rows: list[Any], **config: Any) -> Findings:
    findings = Findings()
    checks.check_logs(findings, [node_of("logs", paths=[str(write(path, rows))], temperature=0, **config)], metadata)
    return findings


def check_sources(path: Path, rows: list[Any], **asked: Any) -> Findings:
    """Check prompts from these rows."""
    findings, source = Findings(), {"kind": "jsonl", "path": str(write(path, rows))}
    prompts.check_sources(findings, [node_of("prompts", sources=[source], **asked)])
    return findings


def answer(number: int, **more: Any) -> dict[str, Any]:
    return GOOD | {"completion": f"once upon a time {'the cat ' * number}."} | more


def asks(number: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"tell story {number}"}]


def test_good_logs_are_counted(metadata: Path, tmp_path: Path) -> None:
    rows = [answer(number) for number in range(9)]
    level, text = check_log(metadata, tmp_path / "a.jsonl", [*rows, answer(20, temperature=1)])
    assert level is Level.OK and "9 of all 10 rows can be used" in text
    rows = [answer(number, temperature=number % 2) for number in range(10)]
    level, text = check_log(metadata, tmp_path / "a.jsonl", rows)
    assert level is Level.WARNING and "5 of all 10 rows can be used" in text


@pytest.mark.parametrize(("count", "level"), [(1, Level.OK), (9, Level.WARNING)])
def test_many_rows_that_cannot_be_prompts_are_a_warning(count: int, level: Level, tmp_path: Path) -> None:
    rows: list[Any] = [{"messages": GOOD["messages"], "tools": [{"type": "function"}]} for _ in range(count)]
    rows += [{"prompt_token_ids": [5, 6, number], "messages": asks(number)} for number in range(9)]
    unusable, enough = check_sources(tmp_path / "a.jsonl", rows, train=4, heldout=0).lines
    assert (unusable.level, enough.level) == (level, Level.OK)
    assert f"{count} of {count + 9} rows cannot be prompts" in unusable.text and "9 rows for 4 prompts" in enough.text


def test_duplicate_prompts_count_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"Question {number % 5}?"} for number in range(60)]
    line = check_sources(tmp_path / "a.jsonl", rows, train=20, heldout=2).lines[-1]
    assert line.level is Level.ERROR and "without 55 duplicates: 5 rows" in line.text


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (
            [answer(1, temperature=1)],
            "0 of all 1 rows can be used; not used: 1 another temperature (1; logs.",
        ),
        (['{"messages": '], "row 1: not JSON"),
    ],
)
def test_logs_without_a_usable_row_are_an_error(rows: list[Any], reason: str, metadata: Path, tmp_path: Path) -> None:
    level, text = check_log(metadata, tmp_path / "a.jsonl", rows)
    assert level is Level.ERROR and reason in text


def test_loads_are_printed_as_the_gate_takes_them(metadata: Path, tmp_path: Path) -> None:
    times = [{"ended_at": f"2026-03-05T12:00:0{end}Z", "duration_s": 4} for end in (5, 5, 7, 7)]
    findings = check_logs(metadata, tmp_path / "a.jsonl", [answer(n, **time) for n, time in enumerate(times)])
    assert [(line.level, line.text) for line in findings.lines] == [
        (Level.OK, "requests in flight, by the times of 4 rows: gate.loads: {2: 0.667, 4: 0.333}"),
        (Level.OK, "4 of all 4 rows can be used"),
    ]


def test_rows_outside_the_window_give_no_warning(metadata: Path, tmp_path: Path) -> None:
    rows = [answer(number, time=f"2026-03-0{number}") for number in range(1, 10)]
    level, text = check_log(metadata, tmp_path / "a.jsonl", rows, since="2026-03-08")
    assert level is Level.OK and text == "2 of all 9 rows can be used; not used: 7 outside the window"


def test_rows_of_two_models_are_a_warning_and_a_filter_chooses(metadata: Path, tmp_path: Path) -> None:
    rows = [answer(number, model="ours" if number % 3 else "theirs") for number in range(9)]
    path = tmp_path / "a.jsonl"
    findings = check_logs(metadata, path, rows)
    models, counted = findings.lines
    assert models.level is Level.WARNING and "2 models (6 of ours, 3 of theirs)" in models.text
    assert counted.text == "9 of all 9 rows can be used"
    level, text = check_log(metadata, path, rows, filter={"model": "ours"})
    assert level is Level.OK and text == "6 of all 9 rows can be used; not used: 3 not let through by filter"
    level, text = check_log(metadata, path, rows, filter={"modell": "ours"})
    assert level is Level.ERROR and "no field modell to filter by" in text


def test_only_the_first_rows_of_a_long_log_are_read(
    metadata: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "_LOG_ROWS", 5)
    rows = [answer(number) for number in range(9)]
    assert check_log(metadata, tmp_path / "a.jsonl", rows) == (Level.OK, "5 of the first 5 rows can be used")
    level, text = check_log(metadata, tmp_path / "b.jsonl", [answer(1, temperature=1)] * 9)
    assert level is Level.WARNING and "0 of the first 5 rows can be used" in text  # later rows may be usable


@pytest.mark.parametrize("of_logs", [True, False])
@pytest.mark.parametrize(("rows", "reason"), [([], "is empty"), (["question,answer", "What?,That."], "looks like CSV")])
def test_a_file_without_rows_is_an_error(rows: list[str], reason: str, of_logs: bool, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    findings = check_logs(None, path, rows) if of_logs else check_sources(path, rows, train=4, heldout=1)
    (line,) = findings.lines
    assert line.level is Level.ERROR and f"{tmp_path}/a.jsonl" in line.text and reason in line.text
