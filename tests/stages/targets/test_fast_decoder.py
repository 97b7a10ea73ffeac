"""What is computed faster than by the model's own code: the same bits in bfloat16, the same numbers in float32.

The fast forward, packed linear maps, features without the layers behind them, and attention over groups of heads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers.integrations.sdpa_attention import repeat_kv

from draftsmith.stages.targets import attention
from draftsmith.stages.targets.attention import grouped_attention, register
from draftsmith.stages.targets.causal_lm import Target, TargetOutput
from draftsmith.stages.targets.info import TargetInfo
from draftsmith.stages.targets.packed_linear import (
    PackedGroup,
    PackedLinear,
    can_pack,
    pack,
    packed_copy,
)
from tests.stages.bench import Bench
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


SEEN = can_pack(torch.empty(1, dtype=torch.bfloat16))
needs_bfloat16 = pytest.mark.skipif(not SEEN, reason="this processor does not multiply in bfloat16")


@needs_bfloat16
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_a_packed_map_equals_the_plain_one(bias: bool, rows: int) -> None:
    generator = torch.manual_seed(0)
    plain = nn.Linear(96, 80, bias=bias).bfloat16().requires_grad_(False)
    packed = PackedLinear(plain.weight, plain.bias)
    x = torch.randn(3, rows, 96, generator=generator).bfloat16()
    for given in (x, x.transpose(0, 1), x[:, ::2], x[0, 0]):
        if not bias:
            assert torch.equal(packed(given), plain(given))
        exact = functional.linear(given.float(), plain.weight.float(), plain.bias.float() if bias else None)
        torch.testing.assert_close(packed(given).float(), exact, rtol=2**-8, atol=1e-6)  # rounded to 8 bits, once
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x.float()), packed(x))
    assert torch.equal(packed.weight, plain.weight)
    assert sum(p.numel() for p in packed.parameters()) == sum(p.numel() for p in plain.parameters())


def test_only_frozen_bfloat16_maps_on_a_cpu_are_packed() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8).bfloat16(), nn.Embedding(4, 8)))
    pack(model)
    assert type(model[0]) is nn.Linear
    assert isinstance(model[1][0], PackedLinear) == SEEN  # type: ignore[index]


class Two(nn.Module):
    """A module with two maps of one input, and one of another."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Linear(32, 48, bias),
            nn.Linear(32, 16, bias),
            nn.Linear(48, 8),
        )
        self.bfloat16().requires_grad_(False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.gate_proj(x), self.up_proj(x)


@needs_bfloat16
@pytest.mark.parametrize("bias", [False, True])
def test_maps_of_one_input_share_one_product(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Two(bias)
    packed = packed_copy(plain, ("gate_proj",), ())
    assert type(packed.gate_proj) is PackedLinear and packed.up_proj is plain.up_proj
    assert type(plain.gate_proj) is nn.Linear
    apart, made = nn.Sequential(plain), nn.Sequential(Two(bias))
    made.load_state_dict(apart.state_dict())
    pack(made), pack(apart, together=())
    products = []
    whole = made[0].gate_proj.whole
    assert isinstance(whole, PackedGroup) and made[0].up_proj.whole is whole
    monkeypatch.setattr(whole, "forward", lambda x: products.append(x) or PackedLinear.forward(whole, x))
    x, other = torch.randn(2, 5, 32).bfloat16(), torch.randn(3, 32).bfloat16()
    for given in (x, other, x):
        for found, expected in zip(made(given), apart(given), strict=True):
            assert torch.equal(found, expected)
    assert len(products) == 3
    assert torch.equal(made[0].up_proj(x), apart[0].up_proj(x))  # by itself, and after another's first part
    made[0].gate_proj(other)
    assert torch.equal(made[0].up_proj(x), apart[0].up_proj(x))
    assert torch.equal(made[0].up_proj.weight, apart[0].up_proj.weight)


@needs_bfloat16
def test_a_target_decodes_with_packed_maps_and_head(plain_artifact: Path) -> None:
    target = Target.load(plain_artifact, dtype="bfloat16")
    assert sum(isinstance(module, PackedLinear) for module in target.decoder.modules()) == 4 * len(
        target.decoder.layers
    )  # queries, keys and values are one map, and so are the MLP's two
    assert target.head_weight.layout == torch.strided
    ids = torch.randint(0, target.info.vocab_size, (2, 9), generator=torch.manual_seed(0))
    hidden = target.read(ids).hidden
    assert torch.equal(target.logits(hidden), functional.linear(hidden, target.head_weight).float())


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("layers", [[0], [2, 0], [3, 1]])
def test_features_alone_have_the_same_bits_and_run_no_later_layer(layers: list[int], bench: Bench) -> None:
    ids = torch.randint(4, 900, (2, 12), generator=torch.Generator().manual_seed(0))
    ran = []
    hooks = [
        layer.register_forward_pre_hook(lambda *_, index=index: ran.append(index))
        for index, layer in enumerate(bench.target.decoder.layers)
    ]
    alone = bench.target.features(ids, layers)
    for hook in hooks:
        hook.remove()
    assert ran == list(range(max(layers) + 1))
    after = bench.target.read(ids, layers)  # nothing of the forward that was cut short is left
    assert after.features is not None
    assert torch.equal(alone, after.features)
    assert torch.equal(bench.target.read(ids).hidden, after.hidden)
    last = bench.target.features(ids, [3])  # before the norm, not behind it
    assert_close(bench.target.decoder.norm(last), after.hidden)


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (4, 1), (4, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("T", "entries"), [(5, 2**31), (5, 60), (1, 2**31)])
@pytest.mark.parametrize("tiles", [False, True])
def test_grouped_attention_equals_repeated_keys(
    heads: int, kv_heads: int, dtype: torch.dtype, T: int, entries: int, tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """entries: of a mask in one call. tiles: as on a processor with AMX."""
    monkeypatch.setattr(attention, "_MASK_ENTRIES", entries)
    monkeypatch.setattr(attention, "_multiplies_tiles", lambda: tiles)
    n, L, D = 2, 9, 8
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(n, heads, T, D, generator=generator).to(dtype)
    key, value = (torch.randn(n, kv_heads, L, D, generator=generator).to(dtype) for _ in range(2))
    seen = torch.rand(n, 1, T, L, generator=generator) < 0.6
    seen[..., 0] = True
    mask = torch.zeros(n, 1, T, L, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    module = torch.nn.Module()
    module.num_key_value_groups = heads // kv_heads  # type: ignore[assignment]
    out, _ = grouped_attention(module, query, key, value, mask, scaling=0.3)
    assert out.is_contiguous()  # of which AFMoE takes a view
    keys, values = (repeat_kv(x, heads // kv_heads) for x in (key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=0.3)
    assert_close(out, expected.transpose(1, 2), 1e-5 if dtype == torch.float32 else 2e-2)
