"""The DFlash model against plain loops, its initial weights, and its slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftsmith.stages.drafters.checkpoint import create_drafter
from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.dflash.model import FeatureSlots
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.target.causal_lm import Target
from tests.stages.drafters.dflash import reference
from tests.testbed import random_target

TOLERANCE = 2e-5  # float32 against float64 on values of order one


def blocks_of(anchor_tokens: torch.Tensor, block_size: int) -> torch.Tensor:
    """Return [B, A, block_size-1]: the anchors' tokens, and zeros where a parallel drafter must not read."""
    tokens = anchor_tokens.new_zeros(*anchor_tokens.shape, block_size - 1)
    tokens[..., 0] = anchor_tokens
    return tokens


SLIDING, FULL = "sliding_attention", "full_attention"
FORMS: dict[str, tuple[dict[str, Any], list[int | None], list[bool]]] = {  # what a config says, and what it means
    "everything": ({}, [None, None], [False, False]),
    "a window": ({"sliding_window": 4, "layer_types": (SLIDING, FULL)}, [4, None], [True, False]),
    "windows smaller than a block": ({"sliding_window": 2}, [2, 2], [True, True]),
    "windows read both ways": ({"sliding_window": 7, "is_causal": False}, [7, 7], [False, False]),
    "backwards": ({"is_causal": True}, [None, None], [True, True]),
}


@pytest.mark.parametrize("block_size", [5, 3], ids=["as trained", "smaller"])
@pytest.mark.parametrize("form", FORMS)
def test_block_hidden_equals_the_plain_float64_reference(form: str, block_size: int, plain_target: Target) -> None:
    fields, windows, causal = FORMS[form]
    plain_drafter = random_target.random_drafter(plain_target, **fields)
    plain_drafter.embedding_scale = 2.5  # as of a target that scales what its first layer reads
    trajectory = random_target.trajectories(1, seed=3)[0]
    tokens = torch.tensor([trajectory.tokens])
    read = plain_target.read(tokens, plain_drafter.target_layer_ids)
    assert read.features is not None
    positions = torch.arange(len(trajectory.tokens))[None]
    anchors = [4, 7, 11, 8]  # not in order, blocks overlap
    with torch.no_grad():
        hidden = plain_drafter.block_hidden(
            plain_drafter.encode(read.features, tokens, positions),
            blocks_of(tokens[:, anchors], block_size),
            torch.tensor([anchors]),
        )
    config = plain_drafter.config
    for index, anchor in enumerate(anchors):
        expected = reference.block_hidden(
            dict(plain_drafter.named_parameters()),
            2.5 * plain_target.embedding,
            read.features[0],
            trajectory.tokens[anchor],
            anchor,
            block_size=block_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            eps=config.rms_norm_eps,
            theta=config.rope_parameters["rope_theta"],
            mask_token=plain_target.tokenizer.mask_token_id,
            windows=windows,
            causal=causal,
        )
        torch.testing.assert_close(hidden[0, index].double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_fresh_drafter_is_seeded_and_starts_at_logits_of_unit_spread(plain_target: Target) -> None:
    shape = DFlashConfig(num_layers=1, block_size=4, target_layer_ids=(1,))
    first, same, other = (create_drafter(shape, plain_target, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), same.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first.parameters(), other.parameters(), strict=True))
    with torch.no_grad():
        tokens = torch.arange(30)[None]
        features = torch.randn(1, 30, random_target.HIDDEN_SIZE, generator=torch.Generator().manual_seed(0))
        context = first.encode(features, tokens, torch.arange(30)[None])
        anchors = torch.arange(1, 30)[None]
        hidden = first.block_hidden(context, blocks_of(anchors, 4), anchors)
        logits = Head(plain_target.head_weight).logits(hidden)
    assert 0.3 < float(logits.std()) < 3


def test_a_layer_with_a_window_stores_what_it_can_reach(plain_target: Target) -> None:
    """It bounds the memory of requests in flight, however long they become."""
    drafter = random_target.random_drafter(plain_target, sliding_window=20, layer_types=(SLIDING, FULL))
    for capacity in (10, 4096):
        context = drafter.new_context(2, capacity)
        assert isinstance(context, FeatureSlots)
        assert [slots.capacity for slots in context.layers] == [min(capacity, 20 + drafter.block_size), capacity]
