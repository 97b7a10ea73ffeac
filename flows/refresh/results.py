"""What a refresh made, in the terminal: the evaluation's tables and verdicts, and where to look next."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from draftsmith.flows.pipeline.display import Display
from draftsmith.stages.gate import DECISION
from draftsmith.stages.reporting import rows
from draftsmith.stages.reporting.verdict import findings
from draftsmith.stages.stored import DRAFTER_FOLDER


def show_results(display: Display, made: Mapping[str, Path], mlflow: str) -> None:
    """made: node -> folder; mlflow: the command that shows the runs, or a server's URL."""
    path = made["evaluation"] / "evaluation.json" if "evaluation" in made else None
    if path is not None and path.is_file():
        evaluation = json.loads(path.read_text("utf-8"))
        for table in (rows.headline(evaluation), rows.by_setting(evaluation)):
            if table is not None:
                display.table(**vars(table))
        for line in [*rows.exactness(evaluation), *findings(evaluation)]:
            display.line(line)
        for line in rows.doubts(evaluation):
            display.line(f"not to be relied on: {line}")
        if "gate" in made:
            for line in rows.chosen(evaluation):
                display.line(line)
    challenger = None
    if "gate" in made and (made["gate"] / DECISION).is_file():
        decision = json.loads((made["gate"] / DECISION).read_text("utf-8"))
        if (table := rows.gate(decision)) is not None:
            display.table(**vars(table))
        display.line(decision["sentence"])
        challenger = decision["challenger"]
    display.line("")
    display.line("Where to look next")
    if "report" in made:
        display.line(f"  report:   {made['report'] / 'report.html'}")
    for name, folder in made.items():
        if (folder / DRAFTER_FOLDER).is_dir():
            marked = f"{name}, the challenger" if name == challenger else name
            display.line(f"  drafter:  {folder / DRAFTER_FOLDER}  ({marked})")
    display.line(f"  MLflow:   {mlflow}")


def verdict_lines(made: Mapping[str, Path]) -> list[str]:
    """Return the verdict of a refresh for the terminal; nothing where no gate has decided.

    made: node -> folder.
    """
    path = made["gate"] / DECISION if "gate" in made else None
    if path is None or not path.is_file():
        return []
    return [json.loads(path.read_text("utf-8"))["sentence"]]
