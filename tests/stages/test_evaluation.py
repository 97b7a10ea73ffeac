"""The stage `evaluation` on the tiny target: complete figures, tau by replay, exact outputs in float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.parquet import read_table
from draftsmith.artifacts.schemas import REQUESTS, TRAJECTORIES
from draftsmith.stages.evaluation import STAGE, EvaluationConfig, preflight
from draftsmith.stages.replay.trace import tau
from draftsmith.stages.sft import STAGE as SFT
from draftsmith.stages.sft import SftConfig
from draftsmith.stages.stored import load_trajectories
from tests.stages.bench import Bench
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts

CONFIG = {
    "sampling": {"max_new_tokens": 32}, "speed_prompts": 5, "validation_prompts": 2, "block_sizes": [3, 8, 16],
    "exactness_prompts": 4, "bootstrap_samples": 300, "concurrency": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def opd(tmp_path_factory: pytest.TempPathFactory, tiny_drafter: DrafterArtifacts) -> Path:
    """A drafter a little different from the trained one."""
    ctx = RecordingContext.under(
        tmp_path_factory.mktemp("opd"),
        {"target": tiny_drafter.target, "trajectories": tiny_drafter.rollout, "drafter": tiny_drafter.drafter},
    )
    SFT.run(ctx, SftConfig(steps=6, learning_rate=3e-3, compute_dtype="float32"))
    return ctx.out


def inputs(made: DrafterArtifacts, **drafters: Path) -> dict[str, Path]:
    return {
        "target": made.target, "prompts": made.prompts, "trajectories": made.heldout, "sft": made.drafter, **drafters,
    }  # fmt: skip


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, tiny_drafter: DrafterArtifacts, opd: Path) -> RecordingContext:
    ctx = RecordingContext.under(
        tmp_path_factory.mktemp("evaluation"), inputs(tiny_drafter, opd=opd, control=tiny_drafter.drafter)
    )
    STAGE.run(ctx, EvaluationConfig.model_validate(CONFIG))
    return ctx


def figures(ctx: RecordingContext) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((ctx.out / "evaluation.json").read_text())
    return content


def test_tau_is_that_of_sequential_replay(
    evaluated: RecordingContext, tiny_drafter: DrafterArtifacts, bench: Bench
) -> None:
    stored = load_trajectories(tiny_drafter.heldout, ["heldout"]).trajectories
    traces = bench.sequential_traces(stored, "trained")
    found = figures(evaluated)["drafters"]["sft"]
    assert found["tau"] == pytest.approx(tau(traces))
    assert found["verify_steps"] == sum(len(trace.anchors) for trace in traces)
    assert found["tau_low"] < found["tau"] < found["tau_high"]
    accepted = np.concatenate([trace.accepted for trace in traces])
    assert found["accepted_histogram"] == np.bincount(accepted, minlength=8).tolist()
    assert found["acceptance_by_offset"][0] == pytest.approx(
        sum(int((trace.accepted >= 1).sum()) for trace in traces) / found["verify_steps"]
    )


def test_differences_are_paired(evaluated: RecordingContext) -> None:
    drafters = figures(evaluated)["drafters"]
    assert drafters["opd"]["diff_to_sft"] == pytest.approx(drafters["opd"]["tau"] - drafters["sft"]["tau"])
    assert (
        drafters["control"]["diff_to_sft"] == drafters["control"]["diff_low"] == drafters["control"]["diff_high"] == 0
    )
    for name in ("diff_to_sft", "diff_to_control"):
        assert drafters["opd"][name] != 0
    paired = drafters["opd"]["diff_high"] - drafters["opd"]["diff_low"]
    assert paired < drafters["opd"]["tau_high"] - drafters["opd"]["tau_low"]


def test_outputs_are_identical_in_float32(evaluated: RecordingContext) -> None:
    exactness = figures(evaluated)["exactness"]
    assert exactness == {
        "serving_dtype": "float32", "identical_share": 1.0, "compared_outputs": 15, "median_margin": None,
        "largest_margin": None, "fp32_prompts": 4, "fp32_identical": 4,
    }  # fmt: skip


def test_the_figures_are_complete(evaluated: RecordingContext) -> None:
    found = figures(evaluated)
    assert "(+1)" in found["definition_of_tau"]
    assert found["heldout_trajectories"] == 60
    assert (found["temperature"], found["concurrency"], found["head_tokens"]) == (0, 2, None)
    assert found["block_size_candidates"].keys() == {"3", "8"}  # 16 is more than was trained
    fastest = max(found["block_size_candidates"], key=found["block_size_candidates"].__getitem__)
    assert found["speed"].keys() == {"plain", "sft", "opd", "control"}
    for arm in ("sft", "opd", "control"):
        speed = found["speed"][arm]
        assert speed["block_size"] == int(fastest)
        assert speed["speedup_low"] <= speed["speedup"] <= speed["speedup_high"]
        assert speed["tau_served"] > 1.5 and speed["identical_share"] == 1
        assert speed["draft_share"] > 0 and speed["verify_share"] > 0
        assert speed["draft_share"] + speed["verify_share"] < 1
        assert len(speed["accepted_histogram"]) == int(fastest)
        assert speed["request_tokens_per_s_median"] > 0
    (setting,) = found["speed_by_setting"]
    assert setting == {"temperature": 0, "concurrency": 2, "arms": found["speed"]}
    assert (found["engine"], found["parity"]) == ("embedded", None)
    assert 0 <= found["loop_share"] <= 1
    assert found["tau_without_loops"].keys() == {"sft", "opd", "control"}
    assert evaluated.summaries["tau_sft"] == found["drafters"]["sft"]["tau"]
    assert evaluated.summaries["speedup_opd"] == found["speed"]["opd"]["speedup"]
    assert evaluated.summaries["plain_tokens_per_s"] > 0


def test_every_arm_has_a_row_for_every_prompt(evaluated: RecordingContext, tiny_drafter: DrafterArtifacts) -> None:
    rows = read_table(evaluated.out / "requests.parquet", REQUESTS).to_pylist()
    assert len(rows) == 4 * 5
    answers = {
        row["prompt_id"]: row["response_ids"]
        for row in read_table(tiny_drafter.heldout / "trajectories.parquet", TRAJECTORIES).to_pylist()
    }
    for row in rows:
        assert row["tokens"] == min(32, len(answers[row["prompt_id"]]))
        assert row["first_difference"] == -1 and np.isnan(row["margin"])
        assert row["identical"] is (None if row["arm"] == "plain" else True)
        assert (row["verify_steps"] > 0) == (row["arm"] != "plain")
        assert row["block_size"] == (1 if row["arm"] == "plain" else figures(evaluated)["speed"]["sft"]["block_size"])
        assert row["seconds"] > 0 and row["concurrency"] == 2
        assert row["response_ids"] == answers[row["prompt_id"]][:32]
        assert (row["accepted"] is None) == (row["arm"] == "plain")


def test_one_drafter_and_a_reduced_head(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    ctx = RecordingContext.under(tmp_path, inputs(tiny_drafter))
    config = {**CONFIG, "head_tokens": 150, "block_sizes": None, "exactness_prompts": 0, "speed_prompts": 2}
    STAGE.run(ctx, EvaluationConfig.model_validate(config))
    found = figures(ctx)
    assert found["drafters"].keys() == {"sft"}
    assert found["drafters"]["sft"]["tau"] <= found["drafters"]["sft"]["tau_full_head"] + 0.05
    assert found["block_size_candidates"] == {}
    assert found["speed"]["sft"]["block_size"] == 8
    assert found["exactness"]["fp32_prompts"] == 0 and found["exactness"]["identical_share"] == 1


def test_sampled_outputs_are_identical_too(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    ctx = RecordingContext.under(tmp_path, inputs(tiny_drafter))
    sampling = {"max_new_tokens": 24, "temperature": 1.0}
    STAGE.run(ctx, EvaluationConfig.model_validate({**CONFIG, "sampling": sampling, "block_sizes": None}))
    assert figures(ctx)["exactness"]["identical_share"] == 1


def test_several_settings(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    """Outputs do not depend on how many are in flight, nor sampled ones on the drafter."""
    ctx = RecordingContext.under(tmp_path, inputs(tiny_drafter))
    config = {
        **CONFIG, "concurrency": [1, 3], "temperatures": [0, 1.0], "block_sizes": None, "speed_prompts": 3,
        "sampling": {"max_new_tokens": 16}, "exactness_prompts": 0,
    }  # fmt: skip
    STAGE.run(ctx, EvaluationConfig.model_validate(config))
    found = figures(ctx)
    places = [(s["temperature"], s["concurrency"]) for s in found["speed_by_setting"]]
    assert places == [(0, 1), (0, 3), (1, 1), (1, 3)]
    assert found["speed"] == found["speed_by_setting"][0]["arms"]
    assert (found["temperature"], found["concurrency"]) == (0, 1)
    assert found["exactness"]["identical_share"] == 1 and found["exactness"]["compared_outputs"] == 4 * 3
    assert ctx.summaries["speedup_sft"] == found["speed"]["sft"]["speedup"]
    assert ctx.summaries["speedup_sft.t1.c3"] == found["speed_by_setting"][3]["arms"]["sft"]["speedup"]
    rows = read_table(ctx.out / "requests.parquet", REQUESTS).to_pylist()
    answers: dict[tuple[float, str], set[tuple[int, ...]]] = {}
    for row in rows:
        answers.setdefault((row["temperature"], row["prompt_id"]), set()).add(tuple(row["response_ids"]))
    assert len(rows) == 4 * 2 * 3 and len(answers) == 6
    assert all(len(same) == 1 for same in answers.values())


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"engine": {"kind": "sglang", "urls": ["http://a"]}}, "engine.urls: running servers cannot serve drafters"),
        ({"engine": {"kind": "sglang", "launch": {}, "python": "p"}, "head_tokens": 9}, "only the embedded engine"),
        ({"concurrency": []}, "concurrency"),
        ({"concurrency": 0}, "concurrency"),
        ({"temperatures": [-1]}, "temperatures"),
    ],
)
def test_wrong_settings_are_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        EvaluationConfig.model_validate(config)


def test_what_is_missing_is_said(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> None:
    ctx = RecordingContext.under(tmp_path, {**inputs(tiny_drafter), "trajectories": tiny_drafter.rollout})
    with pytest.raises(DraftsmithError, match="no answer of split heldout, only of train"):
        STAGE.run(ctx, EvaluationConfig.model_validate(CONFIG))
    longest = {**CONFIG, "sampling": {"max_new_tokens": 1020}}  # fits alone, but not behind a prompt
    with pytest.raises(DraftsmithError, match="the longest prompt and 1020 new tokens need"):
        STAGE.run(ctx, EvaluationConfig.model_validate(longest))
    with pytest.raises(DraftsmithError, match=r"sampling\.max_new_tokens: 5000 does not fit"):
        preflight(EvaluationConfig.model_validate({"sampling": {"max_new_tokens": 5000}}), tiny_drafter.target)
