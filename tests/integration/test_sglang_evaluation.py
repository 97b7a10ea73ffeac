"""Evaluation on real SGLang servers on the CPU: plain and speculative turns, resumed, exact, and gated by replay."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import REQUESTS, TRAJECTORIES
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.evaluation.gate import GateConfig, decide
from draftsmith.stages.evaluation.stage import STAGE
from tests.integration.swapping import write_other_weights
from tests.sglang_cpu.options import CPU_ENVIRONMENT, CPU_OPTIONS
from tests.stages.bench import Bench
from tests.testbed.context import RecordingContext, StoppingContext
from tests.testbed.drafter import DrafterArtifacts

pytestmark = [pytest.mark.integration, pytest.mark.sglang, pytest.mark.timeout(1800)]

MAX_NEW, PROMPTS = 32, 6


@pytest.fixture(scope="module")
def config(sglang_env: Path) -> EvaluationConfig:
    launch = {"options": CPU_OPTIONS, "environment": CPU_ENVIRONMENT}
    return EvaluationConfig.model_validate(
        {
            "engine": {"kind": "sglang", "python": str(sglang_env), "launch": launch},
            "sampling": {"max_new_tokens": MAX_NEW}, "concurrency": [1, 4], "speed_prompts": PROMPTS,
            "parity_prompts": 5, "rounds": 1,
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, tiny_drafter: DrafterArtifacts, config: EvaluationConfig
) -> RecordingContext:
    """Interrupted after the run without a drafter, then run to its end."""
    folder = tmp_path_factory.mktemp("evaluation")
    with pytest.raises(StageInterrupted):
        STAGE.run(StoppingContext.under(folder, tiny_drafter.to_evaluate(), stop_after=1, unit="timed runs"), config)
    ctx = RecordingContext.under(folder, tiny_drafter.to_evaluate())
    STAGE.run(ctx, config)
    return ctx


@pytest.fixture
def metrics(evaluated: RecordingContext) -> dict[str, Any]:
    content: dict[str, Any] = evaluated.json("evaluation.json")
    return content


def test_a_finished_turn_is_not_repeated(evaluated: RecordingContext) -> None:
    assert [line for line in evaluated.logs if line.startswith("round ")] == ["round 1: sft"]
    assert [p[:2] for p in evaluated.progressed if p[2] == "timed runs"] == [(1, 2), (2, 2)]


def test_every_output_is_the_targets_own(
    evaluated: RecordingContext, metrics: dict[str, Any], tiny_drafter: DrafterArtifacts
) -> None:
    rows = read_table(evaluated.out / "requests.parquet", REQUESTS).to_pylist()
    assert len(rows) == 2 * 2 * PROMPTS  # arms, concurrencies
    answers = {
        row["prompt_id"]: row["response_ids"]
        for row in read_table(tiny_drafter.heldout / "trajectories.parquet", TRAJECTORIES).to_pylist()
    }
    for row in rows:
        assert row["response_ids"] == answers[row["prompt_id"]][:MAX_NEW], row["request_id"]
        assert (row["verify_steps"] > 0) == (row["arm"] == "sft")
        assert 0 < row["first_token_seconds"] <= row["latency_seconds"]
        assert row["engine"].startswith("sglang ")
    assert metrics["exactness"] == {
        "serving_dtype": "float32", "identical_share": 1.0, "compared_outputs": 2 * PROMPTS,
        "median_margin": None, "largest_margin": None,
    }  # fmt: skip


def test_served_steps_are_replayed_steps(metrics: dict[str, Any]) -> None:
    parity = metrics["parity"]["sft"]
    assert parity["served_steps"] > 10
    assert (parity["different_steps"], parity["tau_difference"]) == (0, 0)


def test_timed_runs_are_the_curve_by_requests_in_flight(evaluated: RecordingContext) -> None:
    found = EvaluationResult.read(evaluated.out)
    curve, tables = found.load_curve("sft"), found.speed_by_setting
    assert [point.concurrency for point in curve] == [1, 4] and found.load_is_measured
    for point, speed in zip(curve, [table.arms["sft"] for table in tables], strict=True):
        assert (point.tokens_per_s, point.block_size) == (speed.tokens_per_s, speed.block_size)
        assert math.exp(point.value) == pytest.approx(speed.speedup)
    rules = {rule.name: rule for rule in decide(found, GateConfig(loads={2: 1})).rules}
    assert "1 timed run, 5 are needed" in rules["speed-up at your load"].text


def test_a_target_with_another_cache_is_judged_by_its_own_steps(
    tmp_path: Path, tiny_drafter: DrafterArtifacts, config: EvaluationConfig
) -> None:
    """Keys and values are rounded to bfloat16, everything else is computed in float32."""
    fields = config.model_dump(mode="json", exclude_unset=True) | {"concurrency": [4], "speed_prompts": 2}
    fields["engine"]["launch"]["options"] = {**CPU_OPTIONS, "kv-cache-dtype": "bfloat16"}
    ctx = RecordingContext.under(tmp_path, tiny_drafter.to_evaluate())
    STAGE.run(ctx, EvaluationConfig.model_validate(fields))
    found = EvaluationResult.read(ctx.out)
    difference, sft, parity = found.target_difference, found.drafters["sft"], (found.parity or {})["sft"]
    assert difference is not None and difference.settings == ["kv_cache_dtype bfloat16"]
    assert difference.mean is not None and 1e-3 < difference.mean < 0.02
    replayed = EvaluationResult.read(ctx.out, EvaluationResult.ACCEPTANCE_FILE).drafters["sft"]
    assert sft.tau_replayed == replayed.tau and sft.tau == pytest.approx(replayed.tau, rel=0.1)
    assert sft.prompts == 60 and "servers counted" in found.definition_of_tau
    assert parity.mismatch_share is not None, "in float32 a single step would be refused otherwise"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, bench: Bench) -> Path:
    """The artifact of a drafter whose weights were disturbed, as if the server had loaded it wrongly."""
    folder = tmp_path_factory.mktemp("other")
    write_other_weights(bench.drafters["trained"], folder / DRAFTER_FOLDER)
    return folder


def test_steps_of_another_drafter_are_refused(
    tmp_path: Path,
    evaluated: RecordingContext,
    tiny_drafter: DrafterArtifacts,
    other: Path,
    config: EvaluationConfig,
) -> None:
    """Replay with a checkpoint that the servers did not have: their answers stay as they are."""
    shutil.copytree(evaluated.work, tmp_path / "work", ignore=shutil.ignore_patterns("replayed"))
    ctx = RecordingContext.under(tmp_path, tiny_drafter.to_evaluate(sft=other))
    reason = "verify steps served by the engine differ from replay"
    with pytest.raises(DraftsmithError, match=f"^evaluation: drafter sft: .*{reason}.*Check rotary settings") as caught:
        STAGE.run(ctx, config)
    assert "\n" not in str(caught.value)
    assert not any("SGLang" in line for line in ctx.logs)  # no server was needed to see it
