"""The results of the faults: a row each, and the table fault × stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tests.faults.configs import NODES


@dataclass(frozen=True)
class Row:
    """The result of one fault."""

    fault: str
    node: str
    number: int
    seed: int
    point: str  # phase of the stage, and share of the undisturbed duration of that phase
    outcome: str  # "ok", or the defect
    message: str  # what the command reported about the fault
    seconds: float
    commit: str
    at: str


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table without the nodes that no fault has met.

    A cell has the number of runs that ended well, and of all runs if some did not.
    """
    met = {row.node for row in rows}
    nodes = list(dict.fromkeys(node for of_kind in NODES.values() for node in of_kind if node in met))
    head = ["fault", *nodes, "all"]
    lines = [head, ["---"] * len(head)]
    for name in sorted({row.fault for row in rows}):
        mine = [row for row in rows if row.fault == name]
        cells = [[row for row in mine if row.node == node] for node in nodes]
        lines.append([name, *(_cell(cell) for cell in [*cells, mine])])
    broken = [f"- {r.fault}, {r.node} ({r.point}): {r.outcome}" for r in rows if r.outcome != "ok"]
    counts = f"{len(rows)} runs, {len(rows) - len(broken)} ended well"
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *broken, counts])


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    well = sum(row.outcome == "ok" for row in rows)
    return str(well) if well == len(rows) else f"{well} of {len(rows)}"
