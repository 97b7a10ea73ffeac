"""The stages of a whole refresh, in this process, for targets whose layers cache a latent."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from draftsmith.artifacts.results.evaluation import EvaluationResult
from tests.testbed.families import write_family
from tests.testbed.refresh import run_here, small_refresh


@pytest.mark.parametrize("family", ["GLM-5", "DeepSeek-V3", "Kimi K2.5 with images"])
def test_a_refresh_is_lossless(tmp_path: Path, family: str) -> None:
    """With every drafter sampled outputs are the target's own, token for token, and some proposals are accepted."""
    write_family(tmp_path / "model", family)
    prompts, rng = tmp_path / "prompts.jsonl", np.random.default_rng(0)
    rows = [{"prompt_token_ids": rng.integers(0, 50, 5).tolist()} for _ in range(120)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    answers = {"sampling": {"max_new_tokens": 16, "temperature": 1.0}}
    fields = small_refresh(
        "family", tmp_path / "model", prompts, 16,
        prompts={"train": 32, "heldout": 20, "heldout_share": 0.3},
        rollout=answers | {"prompts": 24}, assisted=answers | {"skip": 24}, heldout=answers,
        sft={"steps": 150}, opd={"steps": 5},
        evaluation=answers | {"exactness_prompts": 3, "speed_prompts": 3},
    )  # fmt: skip
    made = run_here(fields, tmp_path)
    result = EvaluationResult.read(made["evaluation"])
    assert set(result.drafters) == {"sft", "control", "opd"}
    exactness = result.exactness
    assert exactness is not None and exactness.identical_share == 1.0
    assert exactness.fp32_identical == exactness.fp32_prompts == 3
    assert max(drafter.tau for drafter in result.drafters.values()) > 1
    assert (made["report"] / "report.html").is_file()
