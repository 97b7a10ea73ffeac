"""Servers that need more GPUs than there are, or over which the target cannot be spread."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from draftsmith.flows.checks import engines
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.pipeline.graph import Node
from draftsmith.stages.rollout import RolloutConfig


@pytest.mark.parametrize(
    ("launch", "advice"),
    [
        ({"servers": 4}, "4 servers of 1 GPUs need 4, 2 are here: --set assisted.engine.launch.servers=2"),
        ({"servers": 2, "tensor_parallel": 2}, "--set assisted.engine.launch.servers=1"),
        (
            {"servers": 2, "tensor_parallel": 2, "router": "cache_aware"},
            "--set assisted.engine.launch.servers=1 --set assisted.engine.launch.router=null",
        ),
        ({"data_parallel": 4}, "--set assisted.engine.launch.data_parallel=2"),
        ({"tensor_parallel": 4}, "--set assisted.engine.launch.tensor_parallel=2"),
    ],
)
def test_the_advice_names_what_a_config_has(
    launch: dict[str, Any], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "gpus", lambda: (80e9,) * 2)
    config = RolloutConfig.model_validate({"engine": {"kind": "sglang", "python": sys.executable, "launch": launch}})
    found = Findings()
    engines._check_gpus(found, [Node("assisted", "draftsmith.stages.rollout", config)])
    (line,) = [line for line in found.lines if line.check == "assisted: GPUs"]
    assert line.text.endswith(advice)


@pytest.mark.parametrize(("over", "fits"), [(1, True), (2, True), (4, True), (3, False), (8, False)])
def test_heads_that_servers_cannot_spread_are_told(over: int, fits: bool, plain_artifact: Path) -> None:
    """SGLang finds that out when the server starts: of an evaluation's, after all trainings. The target has 4 heads."""
    for options in ({}, {"device": "cpu"}):
        launch = {"tensor_parallel": over, "options": options}
        engine = {"kind": "sglang", "python": sys.executable, "launch": launch}
        config = RolloutConfig.model_validate({"engine": engine})
        found = Findings()
        engines.check_heads(found, [Node("heldout", "draftsmith.stages.rollout", config)], plain_artifact)
        assert bool(found.lines) == (not fits and not options)
        assert all(f"{over} does not divide the target's 4 heads (2 of keys and values)" in w for w in found.remarks)
        assert found.errors == 0
