"""What a refresh ends with in the terminal: tables, verdicts, and where to look next."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from draftsmith.flows.pipeline.display import Display
from draftsmith.flows.refresh.results import show_results
from draftsmith.stages.reporting.verdict import findings
from tests.stages.reporting.sample_report import EVALUATION, OF_A_LINE, SERVED


def shown(folder: Path, evaluation: dict[str, Any], **made: Path) -> list[str]:
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    stream = io.StringIO()
    show_results(Display(Console(file=stream, width=200)), {"evaluation": folder, **made}, "mlflow ui --db x")
    return [" ".join(line.split()) for line in stream.getvalue().splitlines()]


def test_the_results_say_what_was_found_with_intervals_and_where_to_look(tmp_path: Path) -> None:
    made = {name: tmp_path / name for name in ("sft", "opd-2", "mining")}
    for name in ("sft", "opd-2"):
        (made[name] / "drafter").mkdir(parents=True)
    lines = shown(tmp_path, EVALUATION, report=Path("/r"), **made)
    assert "plain decoding — — — 61.3 — — — — —" in lines
    assert (
        "SFT + OPD 3.543 [3.432, 3.651] +0.131 [+0.082, +0.180] +0.113 [+0.066, +0.160] 91.7 1.496 [1.456, 1.546] "
        "6 3.31 20%/70% 98.0%"
    ) in lines
    assert any("counted (+1)" in line and "5 turns of the same 6 prompts" in line for line in lines)
    assert "In fp32, 50 of 50 outputs of speculative decoding equal plain decoding, token for token." in lines
    for sentence in findings(EVALUATION):
        assert sentence in lines
    assert "report: /r/report.html" in lines
    assert [line for line in lines if line.startswith("drafter:")] == [
        f"drafter: {tmp_path / 'sft' / 'drafter'} (sft)", f"drafter: {tmp_path / 'opd-2' / 'drafter'} (opd-2)",
    ]  # fmt: skip
    assert lines[-1] == "MLflow: mlflow ui --db x"
    assert "Speed by setting" not in lines


def test_the_challenger_is_named_among_the_drafters(tmp_path: Path) -> None:
    for name in ("sft", "opd"):
        (tmp_path / name / "drafter").mkdir(parents=True)
    (tmp_path / "decision.json").write_text(json.dumps({"challenger": "opd", "sentence": "promoted", "rules": []}))
    made = {"sft": tmp_path / "sft", "opd": tmp_path / "opd", "gate": tmp_path}
    lines = [line for line in shown(tmp_path, OF_A_LINE, **made) if line.startswith("drafter:")]
    assert [line.partition("drafter (")[2] for line in lines] == ["sft)", "opd, the challenger)"]


def test_several_settings_have_a_table_of_their_own(tmp_path: Path) -> None:
    lines = shown(tmp_path, SERVED)
    assert "Speed by setting" in lines
    assert "0 16 SFT + OPD 1467.2 1.496 [1.456, 1.546] 3.31 91.7 0.336 (0.688) 98.0%" in lines
    assert "SFT: 3 of 52 verify steps that the engine served differ from replay." in lines


def test_figures_that_cannot_be_are_named(tmp_path: Path) -> None:
    assert not [line for line in shown(tmp_path, EVALUATION) if "relied" in line]
    lines = shown(tmp_path, OF_A_LINE)
    assert any(line.startswith("not to be relied on: Other processes took between 2% and 48%") for line in lines)


def test_without_an_evaluation_the_way_is_still_shown(tmp_path: Path) -> None:
    stream = io.StringIO()
    show_results(Display(Console(file=stream, width=200)), {"evaluation": tmp_path}, "mlflow ui")
    assert stream.getvalue().split() == ["Where", "to", "look", "next", "MLflow:", "mlflow", "ui"]
