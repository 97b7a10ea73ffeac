"""The chunked sum equals the plain one: value, gradient, and gradient behind a factor."""

from __future__ import annotations

import pytest
import torch

from stages.training.chunked import chunked_sum

N, H, V = 11, 6, 9
GENERATOR = torch.Generator().manual_seed(0)
HEAD, LABELS = torch.randn(V, H, generator=GENERATOR), torch.randint(0, V, (N,), generator=GENERATOR)
INPUT, MIX = torch.randn(N, H, generator=GENERATOR), torch.randn(H, H, generator=GENERATOR)


def value_of(hidden: torch.Tensor, part: slice) -> torch.Tensor:
    weights = torch.arange(1, N + 1)[part]  # a chunk must use its own part
    return (weights * torch.nn.functional.cross_entropy(hidden @ HEAD.T, LABELS[part], reduction="none")).sum()


@pytest.mark.parametrize("chunk", [1, 3, N, 100])
def test_value_and_gradient_equal_the_unchunked_sum(chunk: int) -> None:
    gradients, values = [], []
    for chunked in (True, False):
        mix = MIX.clone().requires_grad_()
        hidden = (INPUT @ mix).tanh()
        total = chunked_sum(hidden, chunk, value_of) if chunked else value_of(hidden, slice(0, N))
        loss = 0.37 * total / 5 + (mix * mix).sum()
        loss.backward()
        assert mix.grad is not None
        gradients.append(mix.grad)
        values.append(total.detach())
    torch.testing.assert_close(values[0], values[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def test_no_positions_give_zero_and_a_zero_gradient() -> None:
    hidden = torch.zeros(0, H, requires_grad=True)
    total = chunked_sum(hidden, 4, value_of)
    total.backward()
    assert float(total.detach()) == 0
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, H)


def test_without_gradients_only_the_value_is_computed() -> None:
    with torch.no_grad():
        total = chunked_sum(INPUT, 4, value_of)
    assert not total.requires_grad
    torch.testing.assert_close(total, value_of(INPUT, slice(0, N)))


def test_a_chunk_is_never_larger_than_asked() -> None:
    seen: list[int] = []

    def spy(hidden: torch.Tensor, part: slice) -> torch.Tensor:
        seen.append(hidden.shape[0])
        assert part.stop - part.start == hidden.shape[0]
        return hidden.sum()

    chunked_sum(INPUT.clone().requires_grad_(), 4, spy)
    assert seen == [4, 4, 3]
