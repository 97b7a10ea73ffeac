"""What a target made of procedural text refuses before it trains, and what is kept of an interrupted training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.stages.experiments.procedural_target import STAGE, ProceduralTargetConfig
from draftsmith.stages.procedural.training import ShapeConfig, TrainingTextConfig, train_target
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed.context import RecordingContext, StoppingContext

SHAPE = ShapeConfig(hidden_size=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate_size=32, vocab_size=300)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ({"documents": 2, "row_tokens": 2000}, "documents: 2 fill no row of 2000 tokens; raise documents"),
        ({"documents": 40, "row_tokens": 8}, "row_tokens: rows of 8 tokens end within the prompt; raise row_tokens"),
    ],
)
def test_rows_that_teach_nothing_are_one_clear_error(tmp_path: Path, text: dict[str, Any], expected: str) -> None:
    with pytest.raises(DraftsmithError, match=expected):
        train_target(tmp_path / "model", TrainingTextConfig(steps=2, rows_per_step=1, **text), SHAPE)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(("stop_after", "goes_on_from"), [(7, 7), (8, 5)], ids=["asked to stop", "killed"])
def test_a_training_goes_on_from_what_it_kept_and_ends_with_the_same_weights(
    tmp_path: Path, stop_after: int, goes_on_from: int
) -> None:
    def kill() -> None:
        raise KeyboardInterrupt

    config = ProceduralTargetConfig(documents=40, steps=10, rows_per_step=1, shape=SHAPE, checkpoint_every=5)
    whole = RecordingContext.under(tmp_path / "whole")
    STAGE.run(whole, config)
    act = None if goes_on_from == stop_after else kill
    cut = StoppingContext.under(tmp_path / "cut", stop_after=stop_after, act=act)
    with pytest.raises((StageInterrupted, KeyboardInterrupt)):
        STAGE.run(cut, config)
    cut.stop = False
    STAGE.run(cut, config)
    assert f"continuing from the checkpoint at step {goes_on_from} of 10" in cut.logs
    assert [done for done, _, _ in cut.progressed][stop_after] == goes_on_from + 1
    assert cut.measured == whole.measured
    weights = "model/model.safetensors"
    assert (cut.out / weights).read_bytes() == (whole.out / weights).read_bytes()


def test_layers_as_in_qwen3_5_give_a_target_that_cannot_be_rewound(tmp_path: Path) -> None:
    shape = SHAPE.model_copy(update={"layers": 2, "full_attention_every": 2})
    context = RecordingContext.under(tmp_path)
    STAGE.run(context, ProceduralTargetConfig(documents=40, steps=2, rows_per_step=1, shape=shape))
    target = Target.load(context.out)
    assert not target.info.rewindable
    assert target.model.config.layer_types == ["linear_attention", "full_attention"]
