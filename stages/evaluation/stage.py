"""Declaration of stage `evaluation`: acceptance and speed of each drafter on held-out prompts."""

from __future__ import annotations

from pathlib import Path

from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.stages.data.stored_prompts import check_answer_fits
from draftsmith.stages.evaluation.config import DRAFTERS, PREFIX, EvaluationConfig
from draftsmith.stages.runtime.stage import Compute, Stage


def preflight(config: EvaluationConfig, target: Path) -> None:
    """Check that the answers fit into the target's context."""
    check_answer_fits(config.sampling.max_new_tokens, target)


STAGE = Stage(
    name="evaluation",
    config=EvaluationConfig,
    inputs=("target", "prompts", "trajectories", *(f"{name}?" for name in DRAFTERS), f"{PREFIX}*"),
    body="draftsmith.stages.evaluation.body",
    preflight=preflight,
    compute=Compute.TIMED,
    sharded=True,
    volatile=("metrics.jsonl", EvaluationResult.FILE, "requests.parquet", "turns.parquet", "versions.json"),
)
