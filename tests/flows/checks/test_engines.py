"""`check` finds servers that need more GPUs than there are, or build tools that are missing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from draftsmith.flows.checks import engines
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.engines.servers.identity import own_logprobs
from draftsmith.stages.engines.stage import RolloutConfig
from tests.stages.engines.servers.test_identity import scoring
from tests.stages.engines.sglang.test_environment import cuda_environment, interpreter
from tests.stages.engines.stand_ins import requirements_of, server_of
from tests.testbed.drafter import DrafterArtifacts
from tests.testbed.refresh import node_of


@pytest.mark.parametrize(
    ("launch", "errors"),
    [({"servers": 2, "tensor_parallel": 2}, 1), ({"tensor_parallel": 4}, 1), ({"servers": 2}, 0)],
)
def test_servers_that_need_more_gpus_than_there_are_are_an_error(
    launch: dict[str, Any], errors: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "visible_gpus", lambda: (80e9,) * 2)
    findings, engine = Findings(), {"kind": "sglang", "python": sys.executable, "launch": launch}
    engines._check_gpus(findings, [node_of("rollout", engine=engine)])
    assert [line.check for line in findings.lines] == ["rollout: GPUs"] * errors


def test_a_target_that_servers_compute_otherwise_is_a_warning(
    tiny_drafter: DrafterArtifacts,
) -> None:
    plain = requirements_of(tiny_drafter, None)

    def warning(engine: dict[str, Any], stored: Path | None = None) -> str:
        findings, config = Findings(), RolloutConfig.model_validate({"engine": engine})
        node = Node("assisted", "draftsmith.stages.engines.stage", config)
        engines.check_served_targets(findings, [node], tiny_drafter.target, stored)
        assert findings.errors == 0
        return "".join(line.text for line in findings.lines)

    launch = {"options": {"quantization": "fp8", "kv_cache_dtype": "fp8_e4m3"}}
    for kind in ("sglang", "vllm"):
        assert "quantization fp8, kv_cache_dtype fp8_e4m3: a run measures" in warning({"kind": kind, "launch": launch})
        assert warning({"kind": kind, "launch": {"options": {"kv-cache-dtype": "auto"}}}) == ""
    assert warning({"kind": "sglang", "urls": ["http://127.0.0.1:9"]}) == "", "it does not answer"
    ours = own_logprobs(plain.target_folder, plain.scored_ids, print)
    with server_of(plain, server={"quantization": "fp8"}, generate=scoring([value + 0.2 for value in ours])) as server:
        url = {"kind": "sglang", "urls": [server.url]}
        assert "quantization fp8: a run measures" in warning(url)
        assert f"quantization fp8: log-probs of {len(ours)} fixed tokens are 0.2 nats" in warning(
            url, tiny_drafter.target
        )


@pytest.mark.parametrize(("gpus", "options", "errors"), [(1, {}, 1), (0, {}, 0), (1, {"device": "cpu"}, 0)])
def test_build_tools_are_needed_by_servers_on_a_gpu_of_this_machine(
    gpus: int, options: dict[str, str], errors: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The environment has ninja and nvcc, and c++ is nowhere."""
    monkeypatch.setattr(engines, "visible_gpus", lambda: (80e9,) * gpus)
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CUDA_HOME", raising=False)
    cuda_environment(tmp_path, ["ninja", "nvcc"])
    python = interpreter(tmp_path / "bin", "0.5.23", plugin=True)
    findings, engine = Findings(), {"kind": "sglang", "python": python, "launch": {"options": options}}
    engines.check_engines(findings, [node_of("rollout", engine=engine)])
    assert findings.errors == errors
