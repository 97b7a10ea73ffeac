"""The stages of a whole refresh, in this process, for a target whose layers cache a latent and choose its entries."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from draftsmith.artifacts.results.evaluation import EvaluationResult
from tests.testbed.families import write_family
from tests.testbed.refresh import run_here, small_refresh


def test_a_refresh_is_lossless(tmp_path: Path) -> None:
    """With every drafter sampled outputs are the target's own, token for token, and some proposals are accepted."""
    write_family(tmp_path / "model", "GLM-5")
    prompts, rng = tmp_path / "prompts.jsonl", np.random.default_rng(0)
    rows = [{"prompt_token_ids": rng.integers(0, 50, 5).tolist()} for _ in range(60)]
    prompts.write_text("\n".join(map(json.dumps, rows)))
    answers = {"sampling": {"max_new_tokens": 16, "temperature": 1.0}}
    fields = small_refresh(
        "family", tmp_path / "model", prompts, 16,
        prompts={"train": 32}, rollout=answers | {"prompts": 24}, assisted=answers | {"skip": 24}, heldout=answers,
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
