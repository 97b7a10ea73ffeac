"""The conclusions of an experiment, as a table in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftsmith.flows.pipeline.display import Display
from draftsmith.stages.experiments.comparison import BASE, Spent, cost_to_reach
from draftsmith.stages.reporting.names import number
from draftsmith.stages.reporting.tables import Table


def show_results(display: Display, made: Mapping[str, Path], _ending: object = None) -> None:
    """Print the comparison of every split, and what the drafter was worth before the change, if there was one."""
    results = _read(made["comparison"])
    for split, figures in results.items():
        display.table(**vars(_table(split, figures)))
    if "before" in made:
        for split, figures in _read(made["before"]).items():
            before = figures["arms"][0]["tau"]
            display.line(f"before the change, {split}: tau {before:.3f}")
            table, never = _regained(before, results[split]["arms"])
            if table.rows:
                display.table(**vars(table))
            if never:
                display.line(f"never within its steps: {', '.join(never)}")
    display.line(f"results: {made['comparison']}")


def _regained(before: float, rows: list[dict[str, Any]]) -> tuple[Table, list[str]]:
    """What each arm had spent, seed by seed (at most, where its smallest budget was more than enough), when its tau was
    back; and the arms of which no seed got there."""
    lines = []
    never = []
    for arm in dict.fromkeys(row["arm"] for row in rows if row["arm"] != BASE):
        of_arm = [row for row in rows if row["arm"] == arm]
        spent = [cost_to_reach(of_arm, before, cost) for cost in ("positions", "seconds")]
        if any(value is not None for value in spent[0]):
            lines.append([arm, *(" ".join(map(_said, each)) for each in spent)])
        else:
            never.append(arm)
    return Table(["arm", "positions", "seconds"], lines, title=f"tau {before:.3f} again at"), never


def _said(spent: Spent | None) -> str:
    return "never" if spent is None else f"{'≤' if spent.at_most else ''}{spent.cost:,.0f}"


def _read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


def _table(split: str, figures: dict[str, Any]) -> Table:
    lines = []
    for row in figures["arms"]:
        compared = ["", "", ""]
        if "difference" in row:
            low, high = (number(row[f"difference_{end}"], "+.3f") for end in ("low", "high"))
            compared = [f"{row['difference']:+.3f}", f"[{low}, {high}]", f"{row['gain']:+.1%}"]
        lines.append(
            [
                row["arm"],
                str(row["steps"]),
                f"{row['positions']:,.0f}",
                f"{row['seconds']:.0f}",
                f"{row['tau']:.3f}",
                " ".join(f"{tau:.3f}" for tau in row["tau_of_seeds"]),
                *compared,
            ]
        )
    return Table(
        ["arm", "steps", "positions", "seconds", "tau", "of the seeds", "to the control", "95 %", "gain"],
        lines,
        title=f"{split}: tau on {figures['trajectories']} trajectories; no drafter passes {figures['ceiling']:.3f}",
        caption=f"An arm is the mean of its trainings ({_seeds(figures['arms'])}); in brackets: single 95 % intervals "
        f"over {figures['prompts']} prompts, of these trainings.",
    )


def _seeds(arms: list[dict[str, Any]]) -> str:
    """Over how many trainings the arms are means."""
    counts = sorted({len(row["tau_of_seeds"]) for row in arms if row["arm"] != BASE})
    return f"{' or '.join(map(str, counts))} seed{'s' if counts != [1] else ''} each"
