"""Values by chunks equal the plain ones: values, gradient, and gradient behind a weight of each row."""

from __future__ import annotations

import pytest
import torch

from draftsmith.stages.training.chunked import chunked_values

N, H, V = 11, 6, 9
GENERATOR = torch.Generator().manual_seed(0)
HEAD, LABELS = torch.randn(V, H, generator=GENERATOR), torch.randint(0, V, (N,), generator=GENERATOR)
INPUT, MIX = torch.randn(N, H, generator=GENERATOR), torch.randn(H, H, generator=GENERATOR)


def values_of(hidden: torch.Tensor, part: slice) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(hidden @ HEAD.T, LABELS[part], reduction="none")  # of its own part


@pytest.mark.parametrize("chunk", [1, 3, N, 100])
def test_values_and_gradient_equal_the_unchunked_ones(chunk: int) -> None:
    gradients, results = [], []
    weights = torch.arange(1.0, N + 1)
    for chunked in (True, False):
        mix = MIX.clone().requires_grad_()
        hidden = (INPUT @ mix).tanh()
        values = chunked_values(hidden, chunk, values_of) if chunked else values_of(hidden, slice(0, N))
        loss = 0.37 * (weights * values).sum() / 5 + (mix * mix).sum()  # every row has a weight of its own
        loss.backward()
        assert mix.grad is not None
        gradients.append(mix.grad)
        results.append(values.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-5)


def test_no_positions_give_no_values_and_a_zero_gradient() -> None:
    hidden = torch.zeros(0, H, requires_grad=True)
    values = chunked_values(hidden, 4, values_of)
    values.sum().backward()
    assert values.shape == (0,)
    assert hidden.grad is not None
    assert hidden.grad.shape == (0, H)


@pytest.mark.parametrize("chunk", [1, 3, N, 100])
def test_a_trained_head_gets_the_unchunked_gradient_too(chunk: int) -> None:
    gradients, results = [], []
    weights = torch.arange(1.0, N + 1)
    for chunked in (True, False):
        head, hidden = (x.clone().requires_grad_() for x in (HEAD, INPUT))

        def with_head(h: torch.Tensor, part: slice, head: torch.Tensor = head) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(h @ head.T, LABELS[part], reduction="none")

        values = (
            chunked_values(hidden, chunk, with_head, trained_head=True) if chunked else with_head(hidden, slice(0, N))
        )
        gradients.append(torch.autograd.grad((weights * values).sum(), (head, hidden)))
        results.append(values.detach())
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_without_gradients_only_the_values_are_computed() -> None:
    with torch.no_grad():
        values = chunked_values(INPUT, 4, values_of)
    assert not values.requires_grad
    torch.testing.assert_close(values, values_of(INPUT, slice(0, N)))


def test_a_chunk_is_never_larger_than_asked() -> None:
    seen: list[int] = []

    def spy(hidden: torch.Tensor, part: slice) -> torch.Tensor:
        seen.append(hidden.shape[0])
        assert part.stop - part.start == hidden.shape[0]
        return hidden.sum(-1)

    chunked_values(INPUT.clone().requires_grad_(), 4, spy)
    assert seen == [4, 4, 3]
