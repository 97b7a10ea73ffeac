"""Checks of a comparison of arms: what has nothing to be compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.pipeline.graph import Node
from draftsmith.stages.experiments.comparison import BASE, PREFIX, ComparisonConfig, Entry


def check_budgets(found: Findings, nodes: Sequence[Node]) -> None:
    """A warning for every number of steps that an arm is trained for and the control is not."""
    for node in nodes:
        if not isinstance(node.config, ComparisonConfig):
            continue
        arms: dict[int, list[str]] = {}  # by their steps
        for name in node.inputs:
            if name.startswith(PREFIX) and (entry := Entry.of_input(name, {name: Path()})).arm != BASE:
                arms.setdefault(entry.steps, []).append(entry.arm)
        control = node.config.control
        for steps, trained in sorted(arms.items()):
            if control not in trained:
                found.warn(
                    node.name,
                    f"{', '.join(dict.fromkeys(trained))} with {steps} steps: nothing to compare with, since the "
                    f"control {control} is not trained for as many: add them to its budgets (arms.{control}.budgets)",
                )
