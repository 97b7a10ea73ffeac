"""The conclusions of an experiment, as a table in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from draftsmith.flows.pipeline.display import Display
from draftsmith.stages.experiments.comparison import BASE, cost_to_reach


def show_results(display: Display, made: Mapping[str, Path], _mlflow: str = "") -> None:
    """Print the comparison of every split, and what the drafter was worth before the change, if there was one."""
    results = _read(made["comparison"])
    for split, figures in results.items():
        title = f"{split}: tau on {figures['trajectories']} trajectories; no drafter passes {figures['ceiling']:.3f}"
        display.console.print(_table(title, figures["arms"]))
    if "before" in made:
        for split, figures in _read(made["before"]).items():
            before = figures["arms"][0]["tau"]
            display.line(f"before the change, {split}: tau {before:.3f}")
            table, never = _regained(before, results[split]["arms"])
            if table.rows:
                display.console.print(table)
            if never:
                display.line(f"never within its steps: {', '.join(never)}")
    display.line(f"results: {made['comparison']}")


def _regained(before: float, rows: list[dict[str, Any]]) -> tuple[Table, list[str]]:
    """What each arm had spent, seed by seed, when its tau was back; and the arms of which no seed got there."""
    table = Table(title=f"tau {before:.3f} again at", title_justify="left", box=None, pad_edge=False)
    for column in ("arm", "positions", "seconds"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    never = []
    for arm in dict.fromkeys(row["arm"] for row in rows if row["arm"] != BASE):
        of_arm = [row for row in rows if row["arm"] == arm]
        spent = [cost_to_reach(of_arm, before, cost) for cost in ("positions", "seconds")]
        if any(value is not None for value in spent[0]):
            table.add_row(
                arm, *(" ".join("never" if value is None else f"{value:,.0f}" for value in each) for each in spent)
            )
        else:
            never.append(arm)
    return table, never


def _read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("arm", "steps", "positions", "seconds", "tau", "of the seeds", "to the control", "95 %", "gain"):
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for row in rows:
        compared = ("", "", "")
        if "difference" in row:
            compared = (
                f"{row['difference']:+.3f}",
                f"[{row['difference_low']:+.3f}, {row['difference_high']:+.3f}]",
                f"{row['gain']:+.1%}",
            )
        table.add_row(
            row["arm"],
            str(row["steps"]),
            f"{row['positions']:,.0f}",
            f"{row['seconds']:.0f}",
            f"{row['tau']:.3f}",
            " ".join(f"{tau:.3f}" for tau in row["tau_of_seeds"]),
            compared[0],
            compared[1].replace("[", r"\["),
            compared[2],
        )
    return table
