"""The fast forward against the model's own code: the same bits in bfloat16, the same numbers in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from draftsmith.stages.target.attention import register
from draftsmith.stages.target.causal_lm import Target, TargetOutput
from draftsmith.stages.target.info import TargetInfo
from draftsmith.stages.target.packed_linear import pack
from tests.testbed.families import ALTERNATING, SHAPE, WINDOW
from tests.testbed.random_target import fill

FIELDS: dict[str, dict[str, Any]] = {
    "Llama": {"attention_bias": True, "rope_parameters": {"rope_type": "linear", "rope_theta": 10.0, "factor": 2.0}},
    "Mistral": {"sliding_window": WINDOW},
    "Qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    "Qwen3": {"num_key_value_heads": 4},
}


def made(name: str, dtype: torch.dtype, fields: dict[str, Any]) -> Target:
    """Return a target of random weights, packed like a loaded one."""
    config = getattr(transformers, f"{name}Config")(**{**SHAPE, **fields})
    config._attn_implementation = register()
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    fill(model, seed=0)
    model = model.to(dtype).requires_grad_(False)
    pack(model.get_decoder())
    return Target(model, None, TargetInfo.model_construct(eos_ids=[]))


def forwards(target: Target) -> list[TargetOutput]:
    """Run a prefill, a block of each row after it, one token of two rows, and a tree."""
    ids = torch.randint(0, SHAPE["vocab_size"], (3, 12), generator=torch.Generator().manual_seed(1))
    positions, cache = torch.arange(12).expand(3, -1), target.new_cache(3, 16)
    rows = torch.tensor([2, 0])
    visible = torch.ones(3, 4, 14, dtype=torch.bool).tril(10)
    visible[:, 2:, 10:12] = False  # two branches of two
    return [
        target.step(ids[:, :7], positions[:, :7], cache, slice(0, 3), layer_ids=(2, 0)),
        target.step(ids[:, 7:10], positions[:, 7:10], cache, slice(0, 3), length=10, layer_ids=(1,)),
        target.step(ids[rows, 10:11], positions[rows, 10:11], cache, rows, length=11),
        target.step(
            ids[:, :4], torch.tensor([[10, 11, 10, 11]] * 3), cache, slice(0, 3),
            write_at=torch.tensor([[10, 11, 12, 13]] * 3), visible=visible, layer_ids=(0, 1, 2),
        ),
    ]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(FIELDS))
def test_a_fast_forward_equals_the_models_own(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    target = made(name, dtype, FIELDS[name])
    assert target._fast is not None
    lean = forwards(target)
    monkeypatch.setitem(target.__dict__, "_fast", None)
    for ours, own in zip(lean, forwards(target), strict=True):
        for found, expected in ((ours.hidden, own.hidden), (ours.features, own.features)):
            if found is None or expected is None:
                assert found is expected
            elif dtype == torch.bfloat16:
                assert torch.equal(found, expected)
            else:
                torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_other_layers_have_no_fast_forward() -> None:
    assert made("Granite", torch.float32, {})._fast is None
    assert made("Llama", torch.float32, {"hidden_act": "gelu"})._fast is None
    model = made("Llama", torch.float32, {})
    model.decoder.layers[1].mlp.add_module("router", torch.nn.Identity())  # as another release may have
    assert model._fast is None
