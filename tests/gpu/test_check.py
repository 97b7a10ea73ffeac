"""The measurements of `make gpu-check` on the CPU, in tiny shapes: the same code, other kernels."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from draftsmith.stages.targets.estimate import PROCESS_BYTES
from tests.gpu import check
from tests.gpu.measure import PROFILED
from tests.gpu.trainings import KINDS

ROOT = Path(__file__).parents[2]


def test_every_training_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--repetitions", "1", "--out", str(tmp_path)]
    assert check.main(options) == 0
    results = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [row["training"] for row in results["rows"]] == list(KINDS)
    shown = capsys.readouterr().out
    for row in results["rows"]:
        assert row["training"] in shown
        numbers = [value for value in row.values() if isinstance(value, float)]
        assert all(math.isfinite(value) and value > 0 for value in numbers)
        assert row["at_once"] == row["answers"]
        assert row["estimated_gb"] < PROCESS_BYTES / 1e9
        kernels = results["kernels"][row["training"]].values()
        assert sum(kernel["share"] for kernel in kernels) == pytest.approx(1)
        assert sum(kernel["calls"] for kernel in kernels) == pytest.approx(PROFILED * row["launches_an_answer"])


def test_the_commands_need_no_index_and_neither_prefect_nor_mlflow() -> None:
    """A GPU machine without a package index has only the numerical libraries."""
    commands = subprocess.run(
        ["make", "--dry-run", "gpu-check", "VENV=nowhere", f"PYTHON={sys.executable}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert commands.count(sys.executable) == 2  # tests, measurements
    assert "pip" not in commands
    program = (
        "import sys, tests.conftest, tests.gpu.check, tests.gpu.refresh; "
        "print({'prefect', 'mlflow', 'datasets', 'gguf'} & set(sys.modules))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"
