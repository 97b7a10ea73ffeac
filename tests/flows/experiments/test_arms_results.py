"""The tables that an experiment ends with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith.flows.experiments.arms_results import show_results
from draftsmith.flows.pipeline.display import Display


def row(arm: str, steps: int, taus: list[float], **difference: float) -> dict[str, Any]:
    costs = {"positions": 1000.0 * steps, "seconds": 2.0 * steps}
    of_seeds = {f"{cost}_of_seeds": [value] * len(taus) for cost, value in costs.items()}
    return {
        "arm": arm, "steps": steps, **costs, **of_seeds,
        "tau": sum(taus) / len(taus), "tau_of_seeds": taus, **difference,
    }  # fmt: skip


def write(folder: Path, arms: list[dict[str, Any]]) -> Path:
    folder.mkdir()
    (folder / "results.json").write_text(
        json.dumps({"heldout": {"trajectories": 200, "prompts": 50, "ceiling": 6.5, "arms": arms}}), encoding="utf-8"
    )
    return folder


def test_what_won_the_old_tau_back_is_told_seed_by_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compared = {"difference": 0.5, "difference_low": 0.25, "difference_high": 0.75, "gain": 0.125}
    arms = [
        row("base", 0, [1.0]),
        row("opd", 10, [3.0, 3.5]), row("opd", 20, [5.0, 4.5], **compared),
        row("sft", 10, [2.0, 2.5]), row("sft", 20, [4.25, 3.75]),
        row("scratch", 20, [1.5]), row("long", 20, [4.5, 3.0]),
    ]  # fmt: skip
    made = {
        "comparison": write(tmp_path / "after", arms),
        "before": write(tmp_path / "before", [row("base", 0, [4.0])]),
    }
    show_results(Display(), made)
    out = capsys.readouterr().out
    assert "heldout: tau on 200 trajectories; no drafter passes 6.500" in out
    lines = {line.split()[0]: line.split() for line in out.splitlines() if line.strip()}
    compact = " ".join(out.split())
    assert "opd 20 20,000 40 4.750 5.000 4.500 +0.500 [+0.250, +0.750] +12.5%" in compact
    assert (
        "An arm is the mean of its trainings (1 or 2 seeds each); in brackets: single 95 % intervals over 50" in compact
    )
    assert "before the change, heldout: tau 4.000" in out
    assert lines["opd"] == ["opd", "15,000", "15,000", "30", "30"]  # halfway between the budgets, each seed
    assert lines["sft"] == ["sft", "18,889", "never", "38", "never"]
    assert lines["long"] == ["long", "≤20,000", "never", "≤40", "never"]
    assert "never within its steps: scratch" in out
