"""What a comparison of architectures found, as a table in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftsmith.artifacts.manifest import read_manifest
from draftsmith.flows.experiments.architectures import arm
from draftsmith.flows.pipeline.display import Display
from draftsmith.stages.reporting import rows
from draftsmith.stages.reporting.rows import Table


def show_results(display: Display, made: Mapping[str, Path], _mlflow: str = "") -> None:
    """One row an arm: plain decoding, then every drafter after SFT, SFT continued, and OPD."""
    evaluation = json.loads((made["evaluation"] / "evaluation.json").read_text())
    display.table(**vars(table(evaluation, operations(made))))
    for line in rows.exactness(evaluation):
        display.line(line)
    display.line(f"results: {made['evaluation']}")


def table(evaluation: Mapping[str, Any], spent: Mapping[str, float]) -> Table:
    """spent: TFLOP of each arm's trainings."""
    columns = (
        rows.DECODING,
        rows.Column("TFLOP", lambda arm: rows.number(spent.get(arm.name), ".1f")),
        rows.TAU,
        rows.DRAFT_MS,
        rows.VERIFY_MS,
        rows.TOKENS_PER_S,
        rows.SPEEDUP,
    )
    caption = (
        "TFLOP: matrix products of the drafter's training steps, SFT included, mining and the target's forwards not. "
        "Each drafter is of one training."
    )
    return rows.arms_table(evaluation, columns, caption=f"{caption} {rows.intervals(evaluation)}")


def operations(made: Mapping[str, Path]) -> dict[str, float]:
    """TFLOP that went into each arm's drafter, those of the SFT that it started from included."""
    spent = {}
    for node in made:
        training, _, name = node.partition("-")
        if training in ("sft", "control", "opd") and name:
            start = 0.0 if training == "sft" else _tflop(made[f"sft-{name}"])
            spent[arm(training, name)] = start + _tflop(made[node])
    return spent


def _tflop(artifact: Path) -> float:
    """Of one training; 0 for a drafter that was taken as it is (`steps: 0`)."""
    return float(read_manifest(artifact).metrics.get("tflop", 0.0))
