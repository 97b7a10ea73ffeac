"""An EAGLE-3 drafter through the stages that follow its warm-start, and with a DFlash drafter in one evaluation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import StageInterrupted
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.schemas import REQUESTS
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.checkpoint import load_drafter, read_info
from draftsmith.stages.evaluation.stage import STAGE as EVALUATION
from draftsmith.stages.training.opd.stage import STAGE as OPD
from draftsmith.stages.training.sft.stage import STAGE as SFT
from tests.stages.bench import Bench
from tests.stages.training.answers import mined_answers
from tests.testbed.context import RecordingContext, StoppingContext
from tests.testbed.drafter import DrafterArtifacts, keep_prompts

TRAINING = {"sequences_per_step": 4, "anchors_per_sequence": 6, "compute_dtype": "float32", "learning_rate": 1e-3}


DRAFTER = {"kind": "eagle3", "block_size": 5, "target_layer_ids": (0, 1, 2), "draft_vocab_size": 120}


@pytest.fixture(scope="module")
def inputs(
    tmp_path_factory: pytest.TempPathFactory, tiny_drafter: DrafterArtifacts, tiny_eagle3: Path, eagle_bench: Bench
) -> dict[str, Path]:
    """Return greedy answers with the EAGLE-3 drafter in the loop, and what was mined on them."""
    folder = tmp_path_factory.mktemp("eagle3")
    clear = {prompt.prompt_id for prompt in eagle_bench.prompts}  # without the drafter's own near-ties
    prompts = keep_prompts(tiny_drafter.prompts, folder / "prompts", clear)
    return mined_answers(folder, tiny_drafter.target, prompts, tiny_eagle3)


def test_mining_finds_the_steps_that_were_served(inputs: dict[str, Path]) -> None:
    summary = json.loads((inputs["mined"] / "summary.json").read_text())
    assert summary["parity"]["served_steps"] == summary["steps"] > 50
    assert (summary["parity"]["mismatch_share"], summary["block_size"]) == (0, 5)
    assert 0 < summary["error_positions"] < summary["steps"]


@pytest.mark.parametrize("stage", ["sft", "opd"])
def test_an_interrupted_training_ends_with_the_same_bits(
    stage: str, inputs: dict[str, Path], bench: Bench, tmp_path: Path
) -> None:
    """In bfloat16, head included; what OPD mined again depends on the weights of earlier steps."""
    fields: dict[str, Any] = {**TRAINING, "steps": 5, "learning_rate": 3e-3, "compute_dtype": "bfloat16"}
    fields |= {"drafter": DRAFTER} if stage == "sft" else {"loss": {"rejected": {"loss": "k3"}}}
    if stage == "sft":
        inputs = {name: path for name, path in inputs.items() if name != "drafter"}

    def run(folder: Path, stop_after: int | None = None) -> StoppingContext:
        ctx = StoppingContext.under(folder, inputs, stop_after=stop_after)
        return ctx.run(OPD if stage == "opd" else SFT, **fields)

    whole = run(tmp_path / "whole")
    with pytest.raises(StageInterrupted):
        run(tmp_path / "cut", 3)
    last = run(tmp_path / "cut")
    assert last.measured == whole.measured[3:]
    name = f"{DRAFTER_FOLDER}/model.safetensors"
    assert (last.out / name).read_bytes() == (whole.out / name).read_bytes()
    assert load_drafter(whole.out / DRAFTER_FOLDER, bench.target).kind == "eagle3" and whole.summaries["tflop"] > 0
    assert read_info(whole.out / DRAFTER_FOLDER).training["stage"] == stage
    if stage == "opd":
        assert any("forward_kl on block offsets" in line for line in whole.logs)
    else:
        assert 0.5 < whole.summaries["draft_vocabulary_coverage"] <= 1


def test_one_evaluation_measures_drafters_of_both_architectures(
    tiny_eagle3: Path, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    made = tiny_drafter
    inputs = {"target": made.target, "prompts": made.prompts, "trajectories": made.heldout}
    ctx = RecordingContext.under(
        tmp_path, inputs | {"drafter:dflash sft": made.drafter, "drafter:eagle3 sft": tiny_eagle3}
    )
    sampling = {"max_new_tokens": 32}
    ctx.run(EVALUATION, sampling=sampling, speed_prompts=4, exactness_prompts=3, rounds=2)
    found = ctx.json("evaluation.json")
    assert list(found["speed"]) == ["plain", "dflash sft", "eagle3 sft"]
    assert {arm: each["block_size"] for arm, each in found["drafters"].items()} == {"dflash sft": 8, "eagle3 sft": 5}
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
    assert all(found["speed"][arm]["block_size"] == decoded[arm] for arm in found["drafters"])
    assert len(found["speed"]["eagle3 sft"]["accepted_histogram"]) == 5
