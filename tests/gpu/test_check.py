"""The script of `make gpu-check` on the CPU, in tiny shapes: the same code, other kernels."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from draftsmith.stages.target.estimate import PROCESS_BYTES
from tests.gpu import check
from tests.gpu.trainings import KINDS
from tests.gpu.watch import TARGET


def test_every_training_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--no-tests", "--repetitions", "1", "--out", str(tmp_path)]
    assert check.main(options) == 0
    results = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [row["training"] for row in results["rows"]] == list(KINDS)
    shown = capsys.readouterr().out
    for row in results["rows"]:
        assert row["training"] in shown
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert all(math.isfinite(value) and value > 0 for value in numbers)
        assert row["at_once"] == row["answers"]
        assert row["target_share"] < 1
        assert row["estimated_gb"] < PROCESS_BYTES / 1e9
        assert sum(results["kernels"][row["training"]].values()) == pytest.approx(1)
    assert len(list(tmp_path.glob("*.trace.json.gz"))) == len(KINDS)
    with gzip.open(tmp_path / "sft.trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name") == TARGET for event in events) == 1, "one step was profiled"
