"""The diagnosis of a stock SGLang server; its CPU stand-in stays away from GPUs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from draftsmith.artifacts.results.evaluation import DiagnosisResult
from draftsmith.stages.evaluation.diagnosis import STAGE, DiagnosisConfig
from tests.sglang_cpu.fixtures import ServingTarget
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts

pytestmark = [pytest.mark.sglang, pytest.mark.integration]


def test_the_standin_is_not_imported_where_there_is_a_gpu(sglang_env: Path) -> None:
    import subprocess

    script = "import torch; torch.cuda.is_available = lambda: True; import sgl_kernel"
    done = subprocess.run([str(sglang_env), "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert "uninstall draftsmith-sglang-cpu" in done.stderr


def test_the_diagnosis_of_a_server(
    dflash_url: str, serving_target: ServingTarget, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    """As the server of its drafter it agrees with replay; asked about another checkpoint, it reports the difference."""
    other = tmp_path / "other"
    shutil.copytree(serving_target.drafter, other)
    config = json.loads((other / "config.json").read_text())
    config["dflash_config"]["mask_token_id"] = 0
    (other / "config.json").write_text(json.dumps(config))
    results = {}
    for folder in (serving_target.drafter, other):
        inputs = {"target": tiny_drafter.target, "prompts": tiny_drafter.prompts}
        ctx = RecordingContext.under(tmp_path / f"of-{folder.name}", inputs)
        config = {"prompts": 6, "sampling": {"max_new_tokens": 32}, "max_parity_mismatch": 0.02}
        STAGE.run(ctx, DiagnosisConfig.model_validate({"url": dflash_url, "drafter": str(folder), **config}))
        results[folder] = DiagnosisResult.read(ctx.out).to_json()
    assert results[serving_target.drafter]["agrees"], results
    assert results[serving_target.drafter]["as_it_is"]["mismatch"] <= 0.02
    assert not results[other]["agrees"] and results[other]["causes"] == [{"cause": "reported by the server"}]
    assert str(other) in results[other]["sentence"]
