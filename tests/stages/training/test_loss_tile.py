"""The compiled loss of a chunk equals the plain one, and moves few bytes by the count of torch's compiler.

On CUDA a training compiles it; here it is compiled for the CPU. The count adds up what each kernel reads and writes.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch._inductor import compile_fx, config, metrics

from draftsmith.stages.drafters.compiled import compiled
from draftsmith.stages.targets.info import IDENTITY, LogitMap
from draftsmith.stages.training.loss_registry import LOSSES
from draftsmith.stages.training.response_loss import FUNCTIONS, ChunkSignal, loss_tile

N, V = 24, 1024
LARGEST = 16  # bytes for each of the drafter's logits, in bfloat16
FLOAT32 = 8  # bytes to write a float32 number for each logit, and to read it
FORM = LogitMap(0.5, 30.0, 0.7)

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles with g++, which is not here")


@pytest.fixture(autouse=True)
def compiler() -> Iterator[None]:
    """Leave no graph of these shapes to other tests."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Count bytes, which the compiler does only for its log and not for what it has in its cache."""
    metrics.reset()
    monkeypatch.setattr(compile_fx.inductor_metrics_log, "isEnabledFor", lambda _: True)
    with config.patch(force_disable_caches=True):
        yield


def results(
    tile: Any, loss: str, dtype: torch.dtype = torch.float32, own_map: LogitMap = FORM, temperature: float = 0.8
) -> list[torch.Tensor]:
    """Return losses, correctness, log q, and the gradient of the losses in the products of the drafter's head."""
    generator = torch.Generator().manual_seed(0)
    products, of_target = (3 * torch.randn(2, N, V, generator=generator)).to(dtype)
    columns = torch.randint(0, V, (N,), generator=generator)
    columns[: N // 2] = products[: N // 2].argmax(-1)
    logprob = -torch.rand(N, generator=generator)
    p = ChunkSignal(columns, logprob, of_target, own_map, temperature, proposal_temperature=temperature)
    products.requires_grad_()
    terms, correct, log_q = tile(products, own_map, p, FUNCTIONS[loss], with_log_q=True)
    (gradient,) = torch.autograd.grad(terms.sum(), products)
    assert 0 < int(correct.sum()) < N
    return [terms.detach(), correct, log_q, gradient]


@pytest.mark.parametrize("loss", LOSSES)
def test_the_compiled_tile_equals_the_plain_one(loss: str) -> None:
    for ours, plain in zip(results(compiled(loss_tile), loss), results(loss_tile, loss), strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.usefixtures("counted")
def test_the_compiled_tile_moves_no_float32_logits(loss: str) -> None:
    results(compiled(loss_tile), loss, torch.bfloat16, IDENTITY, 1.0)
    models = 2 if LOSSES[loss].reads_distribution else 1
    forward, backward = 2 * models, 2 * models + 2  # reads of bfloat16, and the gradient
    moved = metrics.num_bytes_accessed / (N * V)
    assert forward + backward <= moved <= LARGEST and moved < forward + backward + FLOAT32 / 2
