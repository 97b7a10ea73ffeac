"""The DFlash model against plain loops, and its slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from draftsmith.stages.drafters.dflash.model import FeatureSlots
from draftsmith.stages.targets.causal_lm import Target
from tests.stages.drafters.dflash import reference
from tests.stages.drafters.texts import Texts
from tests.testbed import random_target
from tests.testbed.random_target import windows

TOLERANCE = 2e-5  # float32 against float64 on values of order one
SLIDING, FULL = "sliding_attention", "full_attention"
FORMS: dict[str, tuple[dict[str, Any], list[int | None], list[bool]]] = {  # what a config says, and what it means
    "everything": ({}, [None, None], [False, False]),
    "a window": (windows(4, SLIDING, FULL), [4, None], [True, False]),
    "windows smaller than a block": (windows(2), [2, 2], [True, True]),
    "windows read both ways": ({**windows(7), "is_causal": False}, [7, 7], [False, False]),
    "backwards": ({"is_causal": True}, [None, None], [True, True]),
}


@pytest.mark.parametrize("block_size", [5, 3], ids=["as trained", "smaller"])
@pytest.mark.parametrize("form", FORMS)
def test_block_hidden_equals_the_plain_float64_reference(form: str, block_size: int, plain_target: Target) -> None:
    fields, spans, causal = FORMS[form]
    drafter = random_target.random_drafter(plain_target, **fields)
    drafter.embedding_scale = 2.5  # as with a target that scales the inputs of its first layer
    texts = Texts(plain_target, drafter, count=1, seed=3)
    anchors = torch.tensor([[4, 7, 11, 8]])  # not in order, blocks overlap
    given = torch.zeros(1, 4, block_size - 1, dtype=torch.long)  # a parallel drafter reads only the first
    given[..., 0] = texts.tokens[:, anchors[0]]
    with torch.no_grad():
        hidden = drafter.block_hidden(texts.context(), given, anchors)
    for index, anchor in enumerate(anchors[0].tolist()):
        expected = reference.hidden_of(texts, anchor, block_size=block_size, windows=spans, causal=causal)
        torch.testing.assert_close(hidden[0, index].double(), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_a_layer_with_a_window_stores_what_it_can_reach(plain_target: Target) -> None:
    """It bounds the memory of requests in flight, however long they become."""
    drafter = random_target.random_drafter(plain_target, **windows(20, SLIDING, FULL))
    for capacity in (10, 4096):
        context = drafter.new_context(2, capacity)
        assert isinstance(context, FeatureSlots)
        assert [slots.capacity for slots in context.layers] == [min(capacity, 20 + drafter.block_size), capacity]
