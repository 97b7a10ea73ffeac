"""Targets whose angles or scales depend on the text's length: positions stay below the change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.info import model_path
from draftsmith.stages.targets.stage import STAGE, TargetConfig
from tests.testbed.context import RecordingContext
from tests.testbed.families import SHAPE, WORDS
from tests.testbed.random_target import fill, save

STEADY = 16  # positions
ROPE: dict[str, dict[str, Any]] = {
    "longrope": {
        "short_factor": [1.0, 1.1, 1.2, 1.3],
        "long_factor": [2.0, 3.0, 5.0, 8.0],
        "original_max_position_embeddings": STEADY,
    },
    "dynamic": {"factor": 4.0},
}
BLOCK = 5


@pytest.fixture(scope="module", params=[*ROPE, "temperature"])
def context(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> RecordingContext:
    from transformers import Llama4ForCausalLM, Llama4TextConfig, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("rotated")
    shape = SHAPE | {"max_position_embeddings": STEADY if request.param == "dynamic" else 4 * STEADY}
    model: Any
    if request.param == "temperature":
        model = Llama4ForCausalLM(
            Llama4TextConfig(
                **shape, floor_scale=STEADY + 1, attn_scale=2.0, no_rope_layers=[1, 0, 1], moe_layers=[],
                intermediate_size_mlp=48, num_local_experts=1, attention_chunk_size=64,
            )
        )  # fmt: skip
    else:
        rope = {"rope_type": request.param, "rope_theta": 10000.0, **ROPE[request.param]}
        model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope))
    fill(model, 0)
    save(model, folder / "model", WORDS)
    context = RecordingContext.under(folder)
    STAGE.run(context, TargetConfig(source=str(folder / "model"), dtype="float32"))
    return context


@pytest.fixture(scope="module")
def reference(context: RecordingContext) -> Any:
    return AutoModelForCausalLM.from_pretrained(model_path(context.out), dtype=torch.float32)


@pytest.fixture(scope="module")
def target(context: RecordingContext) -> Target:
    return Target.load(context.out, device="cpu")


def test_positions_end_where_angles_change_which_is_logged(context: RecordingContext, target: Target) -> None:
    assert target.info.max_positions == STEADY
    limited = target.config.max_position_embeddings > STEADY
    assert any("Limiting prompt and answer to 16 of 64 positions" in line for line in context.logs) == limited


@pytest.mark.parametrize("lean", [True, False])
def test_padding_and_proposals_beyond_the_end_change_no_angles(
    lean: bool, target: Target, reference: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not lean:
        monkeypatch.setitem(target.__dict__, "_fast", None)
    ids = torch.randint(0, 50, (1, STEADY), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = reference(input_ids=ids, use_cache=False, output_hidden_states=True).hidden_states
    beyond = torch.cat([ids, ids[:, :BLOCK]], 1)
    read = target.read(beyond, (1,))
    assert read.features is not None
    close(read.features[:, :STEADY], expected[2])
    close(target.features(beyond, (1,))[:, :STEADY], expected[2])
    cache, positions = target.new_cache(1, STEADY + BLOCK), torch.arange(STEADY + BLOCK)[None]
    hidden = [
        target.step(beyond[:, at], positions[:, at], cache, slice(0, 1), length=at.stop).hidden
        for at in (slice(0, 9), slice(9, 14), slice(14, 14 + BLOCK))
    ]
    close(torch.cat(hidden, 1)[:, :STEADY], expected[-1])


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
