"""The forwards of decoding, replay and scoring queue their kernels without waiting for the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from draftsmith.stages.drafters import block_attention
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.dflash.model import AttentionSpan, DFlashDrafter
from draftsmith.stages.targets.causal_lm import Target
from tests.gpu.world import EAGLE3, TINY, make_drafter, make_target
from tests.stages.waits import RecordWaits

ROWS, PROMPT, BLOCK = 3, 12, 5


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Answer what torch refuses to answer for `meta`."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda _device: False)


@pytest.fixture(scope="module")
def target() -> Target:
    return make_target(TINY, "meta", "bfloat16")


@pytest.fixture(scope="module", params=["dflash", "eagle3"])
def drafter(request: pytest.FixtureRequest, target: Target) -> Drafter:
    """Return a drafter; with two layers, one of them is sliding."""
    made = make_drafter(TINY.drafter if request.param == "dflash" else EAGLE3, make_target(TINY, "cpu", "bfloat16"))
    if isinstance(made, DFlashDrafter):
        made.spans = [AttentionSpan(4, causal=True), AttentionSpan(None, causal=False)]
    moved = made.bfloat16().to("meta")
    moved._embedding = (target.embedding,)  # type: ignore[assignment]
    return moved


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.long, device="meta")


def count(*shape: int) -> torch.Tensor:
    return torch.arange(shape[-1], device="meta").expand(shape)


@pytest.mark.parametrize(
    "wait",
    [
        lambda: torch.ones(1).item(),
        lambda: int(torch.ones(1)),
        lambda: bool(torch.ones(1)),
        lambda: torch.ones(3).nonzero(),
        lambda: torch.ones(3)[torch.ones(3, dtype=torch.bool)],
        lambda: torch.ones(3).unique(),
        lambda: torch.tensor([1], device="meta"),
        lambda: torch.ones(1).to("meta"),
        lambda: torch.empty(1, device="meta").copy_(torch.ones(1)),
    ],
)
def test_a_wait_is_found(wait: Callable[[], object]) -> None:
    with RecordWaits() as waits:
        wait()
    assert len(waits.found) == 1


def test_forwards_of_the_target_do_not_wait(target: Target) -> None:
    """A prefill, a block of every row, and a tree."""
    cache = target.new_cache(ROWS, PROMPT + 2 * BLOCK)
    rows, ids = slice(0, ROWS), zeros(ROWS, PROMPT)
    with RecordWaits() as waits:
        target.step(ids, count(ROWS, PROMPT), cache, rows, layer_ids=(2, 0))
        positions = zeros(ROWS, 1) + count(BLOCK)
        out = target.step(zeros(ROWS, BLOCK), positions, cache, rows, length=PROMPT + BLOCK, layer_ids=(2, 0))
        target.logits(out.hidden)
        visible = torch.ones(ROWS, BLOCK, PROMPT + BLOCK, dtype=torch.bool, device="meta")
        target.step(zeros(ROWS, BLOCK), positions, cache, rows, write_at=PROMPT + count(ROWS, BLOCK), visible=visible)
    assert waits.found == []


@pytest.mark.parametrize("blocks", [1, 4])
def test_forwards_of_a_drafter_do_not_wait(
    blocks: int, drafter: Drafter, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks after a context that was read in one forward, as in replay, and training, and after one that grew."""
    _, create_mask = block_attention._flex(eager=True)

    def attention(q: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:  # flex attention refuses the device
        return torch.empty_like(q)

    monkeypatch.setattr(block_attention, "_flex", lambda: (attention, create_mask))
    width = target.info.hidden_size * len(drafter.target_layer_ids)
    features = torch.zeros(ROWS, PROMPT, width, dtype=torch.bfloat16, device="meta")
    ids, positions, anchors = zeros(ROWS, PROMPT), count(ROWS, PROMPT), zeros(ROWS, blocks)
    head = drafter.head_over(target.head_weight, None)
    with RecordWaits() as waits, torch.no_grad():
        context = drafter.select(drafter.encode(features, ids, positions), slice(0, ROWS), PROMPT)
        drafter.propose(context, zeros(ROWS, blocks), anchors, BLOCK, head)
        drafter.block_hidden(context, zeros(ROWS, blocks, BLOCK - 1), anchors)
        if blocks == 1:
            grown = drafter.new_context(ROWS, PROMPT + BLOCK)
            drafter.extend(grown, slice(0, ROWS), features, ids, positions, zeros(ROWS) + PROMPT)
            drafter.propose(drafter.select(grown, slice(0, ROWS), PROMPT), zeros(ROWS, blocks), anchors, BLOCK, head)
    assert waits.found == []
