"""What a comparison of architectures found, as a table in the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from draftsmith.artifacts.manifest import read_manifest
from draftsmith.flows.experiments.architectures import arm
from draftsmith.flows.pipeline.display import Display

_COLUMNS = ("decoding", "TFLOP", "tau", "95 %", "draft ms", "verify ms", "tokens/s", "speed-up", "95 %")


def show_results(display: Display, made: Mapping[str, Path], _mlflow: str = "") -> None:
    """One row an arm: plain decoding, then every drafter after SFT, SFT continued, and OPD."""
    evaluation = json.loads((made["evaluation"] / "evaluation.json").read_text())
    table = Table(box=None, pad_edge=False, title_justify="left")
    for name in _COLUMNS:
        table.add_column(name, justify="left" if name == "decoding" else "right", no_wrap=True)
    for row in rows(evaluation, operations(made)):
        table.add_row(*row)
    display.console.print(table)
    exact = evaluation["exactness"]
    if exact.get("fp32_prompts"):  # servers are not compared in float32
        display.line(
            f"float32: {exact['fp32_identical']} of {exact['fp32_prompts']} answers equal plain decoding with every "
            "architecture"
        )
    display.line(
        "TFLOP: matrix products of the drafter's training steps, SFT included, mining and the target's forwards not; "
        "ms: per verify step"
    )
    display.line(f"results: {made['evaluation']}")


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


def rows(evaluation: Mapping[str, Any], spent: Mapping[str, float]) -> list[tuple[str, ...]]:
    """The cells of the table."""
    found: list[tuple[str, ...]] = []
    for name, speed in evaluation["speed"].items():
        tau = evaluation["drafters"].get(name)
        found.append(
            (
                name,
                f"{spent[name]:.1f}" if name in spent else "-",
                f"{tau['tau']:.3f}" if tau else "-",
                f"{tau['tau_low']:.3f} … {tau['tau_high']:.3f}" if tau else "-",
                f"{speed['draft_ms_per_step']:.1f}" if "draft_ms_per_step" in speed else "-",
                f"{speed['verify_ms_per_step']:.1f}" if "verify_ms_per_step" in speed else "-",
                f"{speed['tokens_per_s']:.1f}",
                f"{speed['speedup']:.2f}" if "speedup" in speed else "-",
                f"{speed['speedup_low']:.2f} … {speed['speedup_high']:.2f}" if "speedup" in speed else "-",
            )
        )
    return found
