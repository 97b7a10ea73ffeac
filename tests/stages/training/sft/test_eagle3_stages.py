"""An EAGLE-3 drafter through the stages that follow its warm-start, and beside a DFlash drafter in one evaluation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import REQUESTS
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.checkpoint import load_drafter, read_info
from draftsmith.stages.engines.stage import STAGE as ROLLOUT
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.evaluation.stage import STAGE as EVALUATION
from draftsmith.stages.replay.stage import STAGE as MINING
from draftsmith.stages.replay.stage import MiningConfig
from draftsmith.stages.training.config import OpdConfig, SftConfig
from draftsmith.stages.training.opd.stage import STAGE as OPD
from draftsmith.stages.training.sft.stage import STAGE as SFT
from tests.stages.bench import Bench
from tests.testbed.context import RecordingContext, StoppingContext
from tests.testbed.drafter import DrafterArtifacts, keep_prompts

TRAINING = {"sequences_per_step": 4, "anchors_per_sequence": 6, "compute_dtype": "float32", "learning_rate": 1e-3}


@dataclass(frozen=True)
class Mined:
    """Greedy answers with the EAGLE-3 drafter in the loop, mined."""

    inputs: dict[str, Path]  # of a training that continues from it
    steps: Path
    summary: dict[str, Any]


@pytest.fixture(scope="module")
def mined(
    tmp_path_factory: pytest.TempPathFactory, tiny_drafter: DrafterArtifacts, tiny_eagle3: Path, eagle_bench: Bench
) -> Mined:
    folder = tmp_path_factory.mktemp("eagle3")
    clear = {prompt.prompt_id for prompt in eagle_bench.prompts}  # the drafter's own near-ties are left out
    prompts = keep_prompts(tiny_drafter.prompts, folder / "prompts", clear)
    inputs = {"target": tiny_drafter.target, "drafter": tiny_eagle3}
    rollout = RecordingContext.under(folder / "rollout", {**inputs, "prompts": prompts})
    config = {"splits": ["heldout"], "prompts": 16, "sampling": {"max_new_tokens": 60}, "engine": {"slots": 16}}
    ROLLOUT.run(rollout, RolloutConfig.model_validate(config))
    inputs["trajectories"] = rollout.out
    mining = RecordingContext.under(folder / "mining", inputs)
    MINING.run(mining, MiningConfig())
    return Mined(inputs, mining.out, json.loads((mining.out / "summary.json").read_text()))


def train(folder: Path, mined: Mined, **fields: Any) -> RecordingContext:
    ctx = RecordingContext.under(folder, {**mined.inputs, "mined": mined.steps})
    OPD.run(ctx, OpdConfig.model_validate({**TRAINING, "steps": 20, **fields}))
    return ctx


def test_mining_finds_the_steps_that_were_served(mined: Mined) -> None:
    parity = mined.summary["parity"]
    assert parity["served_steps"] == mined.summary["steps"] > 50
    assert parity["mismatch_share"] == 0
    assert mined.summary["block_size"] == 5
    assert 0 < mined.summary["error_positions"] < mined.summary["steps"]


def test_opd_trains_whole_blocks_with_forward_kl_and_no_rejected_stream(
    mined: Mined, bench: Bench, tmp_path: Path
) -> None:
    ctx = train(tmp_path, mined)
    assert any("forward_kl on block offsets" in line for line in ctx.logs)
    assert not any("k3" in line for line in ctx.logs)
    assert all("loss_rejected" not in values for _, values in ctx.measured)
    trained = load_drafter(ctx.out / DRAFTER_FOLDER, bench.target)
    assert trained.kind == "eagle3"
    assert read_info(ctx.out / DRAFTER_FOLDER).training["stage"] == "opd"
    assert ctx.summaries["tflop"] > 0


def test_the_loss_is_the_weighted_sum_of_both_streams(mined: Mined, tmp_path: Path) -> None:
    ctx = train(tmp_path, mined, loss={"rejected": {"loss": "k3", "weight": 0.3}}, steps=5)
    for _, values in ctx.measured:
        assert values["loss"] == pytest.approx(values["loss_response"] + 0.3 * values["loss_rejected"], rel=1e-5)
        assert values["loss_rejected"] > 0


@pytest.mark.parametrize("stage", ["sft", "opd"])
def test_an_interrupted_training_ends_with_the_same_bits(stage: str, mined: Mined, tmp_path: Path) -> None:
    """In bfloat16, head included; what OPD mined again depends on the weights of earlier steps."""
    fields: dict[str, Any] = {**TRAINING, "steps": 5, "learning_rate": 3e-3, "compute_dtype": "bfloat16"}
    inputs = {name: path for name, path in mined.inputs.items() if stage == "opd" or name != "drafter"}

    def run(folder: Path, stop_after: int | None = None) -> StoppingContext:
        ctx = StoppingContext.under(folder, inputs | {"mined": mined.steps}, stop_after=stop_after)
        if stage == "opd":
            OPD.run(ctx, OpdConfig.model_validate({**fields, "loss": {"rejected": {"loss": "k3"}}}))
        else:
            drafter = {"kind": "eagle3", "block_size": 5, "target_layer_ids": (0, 1, 2), "draft_vocab_size": 120}
            SFT.run(ctx, SftConfig.model_validate({**fields, "drafter": drafter}))
        return ctx

    whole = run(tmp_path / "whole")
    with pytest.raises(StageInterrupted):
        run(tmp_path / "cut", 3)
    last = run(tmp_path / "cut")
    assert last.measured == whole.measured[3:]
    name = f"{DRAFTER_FOLDER}/model.safetensors"
    assert (last.out / name).read_bytes() == (whole.out / name).read_bytes()


def test_continued_sft_starts_at_the_loss_where_it_ended(mined: Mined, tmp_path: Path) -> None:
    inputs = {name: mined.inputs[name] for name in ("target", "drafter", "trajectories")}
    ctx = RecordingContext.under(tmp_path, inputs)
    SFT.run(ctx, SftConfig.model_validate({**TRAINING, "steps": 3}))
    fresh = RecordingContext.under(tmp_path / "fresh", {k: v for k, v in inputs.items() if k != "drafter"})
    drafter = {"kind": "eagle3", "block_size": 5, "target_layer_ids": (0, 1, 2), "draft_vocab_size": 120}
    SFT.run(fresh, SftConfig.model_validate({**TRAINING, "steps": 3, "drafter": drafter}))
    assert ctx.measured[0][1]["loss"] < 0.5 * fresh.measured[0][1]["loss"]
    assert 0.5 < fresh.summaries["draft_vocabulary_coverage"] <= 1


def test_one_evaluation_measures_drafters_of_both_architectures(
    mined: Mined, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    inputs = {
        "target": tiny_drafter.target,
        "prompts": tiny_drafter.prompts,
        "trajectories": tiny_drafter.heldout,
        "drafter:dflash sft": tiny_drafter.drafter,
        "drafter:eagle3 sft": mined.inputs["drafter"],
    }
    ctx = RecordingContext.under(tmp_path, inputs)
    config = {"sampling": {"max_new_tokens": 32}, "speed_prompts": 4, "exactness_prompts": 3, "rounds": 2}
    EVALUATION.run(ctx, EvaluationConfig.model_validate(config))
    found = json.loads((ctx.out / "evaluation.json").read_text())
    assert list(found["speed"]) == ["plain", "dflash sft", "eagle3 sft"]
    assert found["drafters"]["dflash sft"]["block_size"] == 8
    assert found["drafters"]["eagle3 sft"]["block_size"] == 5
    assert 1.5 < found["drafters"]["eagle3 sft"]["tau"] <= 5
    assert found["drafters"]["dflash sft"]["differences"] == {}
    worse = found["drafters"]["eagle3 sft"]["differences"]["dflash sft"]
    assert worse["high"] < 0
    verdicts = {verdict["kind"]: verdict for verdict in found["verdicts"]}
    assert verdicts["tau"]["different"] and verdicts["speed"]["different"] is None, "two timed runs are too few"
    exact = found["exactness"]
    assert (exact["fp32_prompts"], exact["fp32_identical"]) == (3, 3)
    for arm in ("dflash sft", "eagle3 sft"):
        assert found["speed"][arm]["draft_ms_per_step"] > 0
        assert found["speed"][arm]["identical_share"] == 1  # the test bed's target is served in float32
    rows = read_table(ctx.out / "requests.parquet", REQUESTS).to_pylist()
    # each decodes with blocks of the size that it was trained on
    decoded = {"plain": 1, "dflash sft": 8, "eagle3 sft": 5}
    assert {(row["arm"], row["block_size"]) for row in rows} == set(decoded.items())
    assert {arm: found["speed"][arm]["block_size"] for arm in found["drafters"]} == {
        arm: size for arm, size in decoded.items() if arm != "plain"
    }
    assert len(found["speed"]["eagle3 sft"]["accepted_histogram"]) == 5


def test_an_evaluation_without_a_drafter_is_refused(tiny_drafter: DrafterArtifacts, tmp_path: Path) -> None:
    inputs = {
        "target": tiny_drafter.target,
        "prompts": tiny_drafter.prompts,
        "trajectories": tiny_drafter.heldout,
    }
    with pytest.raises(DraftsmithError, match="drafter"):
        EVALUATION.run(RecordingContext.under(tmp_path, inputs), EvaluationConfig())
