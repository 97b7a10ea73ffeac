"""A layer compiled around attention equals the eager one, in a few graphs for all lengths, with an adapter too.

On CUDA a training compiles these methods; here they are compiled for the CPU. A graph break is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from draftsmith.stages.drafters import compiled
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.config import LoraOptions
from draftsmith.stages.training.lora import Adapter
from tests.stages.drafters.texts import Texts
from tests.testbed.architectures import RANDOM

SHAPES = [(2, 12, 5), (3, 14, 4), (3, 17, 2), (2, 11, 7)]  # rows, positions, blocks a row


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[CompileCounterWithBackend]:
    """Compile what is compiled on CUDA, and count the graphs."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @cache
    def compile_(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, dynamic=True, fullgraph=True, backend=counter)

    monkeypatch.setattr(compiled, "compiled", compile_)
    monkeypatch.setattr(compiled, "is_compiled", lambda module, _: module.training)
    yield counter
    torch._dynamo.reset()


def gradients(texts: Texts, rows: int, width: int, blocks: int) -> list[torch.Tensor]:
    """Return the hidden states of some blocks, and their gradients in all trained weights."""
    drafter, part = texts.drafter, (slice(rows), slice(width))
    anchors = torch.arange(4, 4 + blocks).expand(len(texts.trajectories), -1)
    context = drafter.encode(texts.features[part], texts.tokens[part], texts.positions[part])
    hidden = drafter.block_hidden(context, texts.chains(anchors)[:rows], anchors[:rows])
    trained = [weight for weight in drafter.parameters() if weight.requires_grad]
    return [hidden.detach(), *torch.autograd.grad(hidden.square().sum(), trained, materialize_grads=True)]


@pytest.mark.parametrize(
    ("kind", "adapted"), [("dflash", False), ("dflash2", True), ("dspark", True), ("eagle3", False)]
)
def test_a_compiled_layer_equals_the_eager_one(
    kind: str, adapted: bool, plain_target: Target, counter: CompileCounterWithBackend
) -> None:
    drafter = RANDOM[kind](plain_target)
    if adapted:
        Adapter(drafter, LoraOptions(rank=4), "float32", 0)
    texts, names, graphs = Texts(plain_target, drafter), list(drafter.state_dict()), []
    for shape in SHAPES:
        drafter.eval()
        expected = gradients(texts, *shape)
        drafter.train()
        for ours, theirs in zip(gradients(texts, *shape), expected, strict=True):
            assert float((ours - theirs).norm()) <= 1e-5 * float(theirs.norm())
        graphs.append(counter.frame_count)
    assert graphs[0] >= 3  # the context's keys, before and after attention
    assert graphs[1:] == [graphs[1]] * 3 and graphs[1] <= graphs[0] + 2
    assert list(drafter.state_dict()) == names
