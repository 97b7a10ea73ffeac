"""Packed linear maps equal the plain ones bit for bit, for any strides; only bfloat16 on a CPU is packed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional

from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.packed_linear import (
    PackedGroup,
    PackedLinear,
    PackedSlice,
    can_pack,
    pack,
    packed_copy,
)

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
    assert torch.equal(made[0].up_proj(x), apart[0].up_proj(x))  # alone, and behind another's first part
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
    plain = Target.load(plain_artifact, dtype="bfloat16")
    for module in plain.decoder.modules():
        for name, child in list(module.named_children()):
            if isinstance(child, PackedLinear | PackedSlice):
                linear = nn.Linear(child.in_features, child.out_features, bias=False)
                linear.weight = nn.Parameter(child.weight, requires_grad=False)
                setattr(module, name, linear)
    ids = torch.randint(0, target.info.vocab_size, (2, 9), generator=torch.manual_seed(0))
    hidden = target.read(ids).hidden
    assert torch.equal(hidden, plain.read(ids).hidden)
    assert torch.equal(target.logits(hidden), functional.linear(hidden, target.head_weight).float())
