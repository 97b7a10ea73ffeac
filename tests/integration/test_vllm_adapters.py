"""A launched vLLM server of a target with LoRA adapters: answers and anchors are the embedded engine's, float32."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.testbed.adapters import rolled_out_alike, served_inputs
from tests.testbed.drafter import DrafterArtifacts
from tests.vllm_cpu.server import launched, vllm_python

PYTHON = vllm_python()
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.integration,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(isinstance(PYTHON, str), reason=str(PYTHON)),
]


@pytest.mark.parametrize("drafts", [False, True], ids=["plain", "drafting"])
def test_a_server_answers_under_each_adapter(
    drafts: bool, tmp_path: Path, tiny_target: Path, tiny_prompts: Path, tiny_drafter: DrafterArtifacts
) -> None:
    inputs = served_inputs(tmp_path, tiny_target, tiny_prompts, tiny_drafter.drafter)
    given = inputs if drafts else {name: inputs[name] for name in ("target", "prompts")}
    rolled_out_alike(tmp_path, given, launched(Path(PYTHON)), proposals=False)
