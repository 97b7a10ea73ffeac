"""What a comparison of architectures found, as a table in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from draftsmith.artifacts.manifest import read_manifest
from draftsmith.flows.experiments.architectures import arm
from draftsmith.flows.pipeline.display import Display
from draftsmith.stages.reporting.names import interval, name_of, number
from draftsmith.stages.reporting.review import exactness
from draftsmith.stages.reporting.tables import Table


def show_results(display: Display, made: Mapping[str, Path], _ending: object = None) -> None:
    """One row an arm: plain decoding, then every drafter after SFT, SFT continued, and OPD."""
    evaluation = json.loads((made["evaluation"] / "evaluation.json").read_text())
    display.table(**vars(table(evaluation, operations(made))))
    for line in exactness(evaluation):
        display.line(line)
    display.line(f"results: {made['evaluation']}")


def table(evaluation: Mapping[str, Any], spent: Mapping[str, float]) -> Table:
    """spent: TFLOP of each arm's trainings."""
    caption = (
        "TFLOP: matrix products of the drafter's training steps, SFT included, mining and the target's forwards not. "
        "Each drafter is of one training. In brackets: single 95 % intervals."
    )
    lines = []
    for name, speed in evaluation["speed"].items():
        tau = [(evaluation["drafters"].get(name) or {}).get(each) for each in ("tau", "tau_low", "tau_high")]
        times = [number(speed.get(f"{part}_ms_per_step"), ".1f") for part in ("draft", "verify")]
        gain = interval([speed.get(f"speedup{end}") for end in ("", "_low", "_high")], ".3f")
        measured = [interval(tau, ".3f"), *times, number(speed.get("tokens_per_s"), ".1f"), gain]
        lines.append([name_of(name), number(spent.get(name), ".1f"), *measured])
    head = ["decoding", "TFLOP", "acceptance length", "draft ms a step", "verify ms a step", "tokens/s", "speed-up"]
    return Table(head, lines, caption=caption)


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
