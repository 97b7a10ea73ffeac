"""The target's own head is an arm of every evaluation of it, unless a compared drafter is that head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.results.evaluation import NATIVE, EvaluationResult
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.evaluation.stage import STAGE
from draftsmith.stages.runtime.stage import Shard
from tests.stages.drafters.edits import setting
from tests.testbed import native, target
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts

QUICK: dict[str, Any] = {
    "sampling": {"max_new_tokens": 24}, "rounds": 1, "speed_prompts": 2, "validation_prompts": 2,
    "exactness_prompts": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def dflash(target_with_head: Path, tiny_drafter: DrafterArtifacts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return native.adopted_dflash(tiny_drafter, target_with_head, tmp_path_factory.mktemp("dflash"))


def evaluated(folder: Path, target_with_head: Path, made: DrafterArtifacts, **drafters: Path) -> RecordingContext:
    inputs = {"target": target_with_head, "prompts": made.prompts, "trajectories": made.heldout, **drafters}
    return RecordingContext.under(folder, inputs).run(STAGE, **QUICK)


def test_a_head_is_an_arm_by_tau_and_by_speed_and_never_the_challenger(
    target_with_head: Path, taken_head: Path, dflash: Path, tiny_drafter: DrafterArtifacts, tmp_path: Path
) -> None:
    ctx = evaluated(tmp_path / "whole", target_with_head, tiny_drafter, sft=dflash, opd=dflash)
    found = EvaluationResult.read(ctx.out)
    assert list(found.drafters) == ["sft", "opd", NATIVE] and set(found.speed) == {"plain", *found.drafters}
    assert found.drafters[NATIVE].block_size == 4 and (found.validation_tau or {}).keys() == found.drafters.keys()
    assert found.challenger in ("sft", "opd") and found.better_arm is None
    compared = {(verdict.arm, verdict.other) for verdict in found.verdicts}
    assert compared == {("opd", "sft"), ("opd", NATIVE), (NATIVE, "sft")}
    assert found.exactness.fp32_identical == found.exactness.fp32_prompts == 2
    alone = EvaluationResult.read(evaluated(tmp_path / "alone", target_with_head, tiny_drafter, sft=taken_head).out)
    assert list(alone.drafters) == ["sft"], "a drafter that is the head is not shown twice"
    assert alone.drafters["sft"].tau == found.drafters[NATIVE].tau
    part = RecordingContext.under(tmp_path / "part", ctx.inputs)
    config = EvaluationConfig.model_validate(QUICK)
    STAGE.shard(part, config, Shard(0, 1))
    joined = RecordingContext.under(tmp_path / "joined", ctx.inputs, shards=[part.out])
    STAGE.run(joined, config)
    assert joined.json("acceptance.json") == ctx.json("acceptance.json")


def test_a_head_that_cannot_be_read_ends_no_evaluation(tiny_drafter: DrafterArtifacts, tmp_path: Path) -> None:
    model = native.write_glm(target.target_folder(), tmp_path / "model", native.head_file())
    setting(num_nextn_predict_layers=2)(model)
    two_layers = native.artifact_of(model, tmp_path / "target")
    dflash = native.adopted_dflash(tiny_drafter, two_layers, tmp_path / "dflash")
    ctx = evaluated(tmp_path / "evaluation", two_layers, tiny_drafter, sft=dflash)
    assert list(EvaluationResult.read(ctx.out).drafters) == ["sft"]
    assert any("own head is not measured" in line and "only heads of one layer" in line for line in ctx.logs)
