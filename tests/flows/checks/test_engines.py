"""`check` finds servers that need more GPUs than there are, or build tools that are missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from draftsmith.flows.checks import engines
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.engines.stage import RolloutConfig
from tests.stages.engines.test_sglang_environment import cuda_environment, interpreter


@pytest.mark.parametrize(
    ("launch", "errors"),
    [({"servers": 2, "tensor_parallel": 2}, 1), ({"data_parallel": 4}, 1), ({"servers": 2}, 0)],
)
def test_servers_that_need_more_gpus_than_there_are_are_an_error(
    launch: dict[str, Any], errors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "gpus", lambda: (80e9,) * 2)
    config = RolloutConfig.model_validate({"engine": {"kind": "sglang", "python": sys.executable, "launch": launch}})
    findings = Findings()
    engines._check_gpus(findings, [Node("assisted", "draftsmith.stages.engines.stage", config)])
    assert [line.check for line in findings.lines] == ["assisted: GPUs"] * errors


@pytest.mark.parametrize(("gpus", "options", "errors"), [(1, {}, 1), (0, {}, 0), (1, {"device": "cpu"}, 0)])
def test_build_tools_are_needed_by_servers_on_a_gpu_of_this_machine(
    gpus: int, options: dict[str, str], errors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment has ninja and nvcc, and c++ is nowhere."""
    monkeypatch.setattr(engines, "gpus", lambda: (80e9,) * gpus)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    cuda_environment(tmp_path, ["ninja", "nvcc"])
    python = interpreter(tmp_path / "bin", "0.5.23", plugin=True)
    engine = {"kind": "sglang", "python": python, "launch": {"options": options}}
    config = RolloutConfig.model_validate({"engine": engine})
    findings = Findings()
    engines.check_engines(findings, [Node("assisted", "draftsmith.stages.engines.stage", config)])
    assert findings.errors == errors
