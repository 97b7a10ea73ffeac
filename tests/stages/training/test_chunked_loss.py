"""Values by chunks equal the unchunked ones, with their gradients, also after weights of rows and a trained head."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from draftsmith.stages.training.losses import chunked_values

N, H, V = 11, 6, 9
GENERATOR = torch.Generator().manual_seed(0)
HEAD, LABELS = torch.randn(V, H, generator=GENERATOR), torch.randint(0, V, (N,), generator=GENERATOR)
INPUT, MIX = torch.randn(N, H, generator=GENERATOR), torch.randn(H, H, generator=GENERATOR)


def values_of_head(head: torch.Tensor) -> Callable[[torch.Tensor, slice], torch.Tensor]:
    """Return the cross-entropy of rows against their labels."""
    return lambda hidden, chunk: torch.nn.functional.cross_entropy(hidden @ head.T, LABELS[chunk], reduction="none")


trained_or_not = pytest.mark.parametrize("trained_head", [False, True], ids=["frozen head", "trained head"])


@trained_or_not
@pytest.mark.parametrize("chunk", [1, 3, N, 100])
def test_values_and_gradients_equal_the_unchunked_ones(chunk: int, trained_head: bool) -> None:
    """Also the gradients of the layer before the head and of the head, after a weight of each row."""
    results = []
    for chunked in (True, False):
        mix, head = MIX.clone().requires_grad_(), HEAD.clone().requires_grad_(trained_head)
        hidden, values_of = (INPUT @ mix).tanh(), values_of_head(head)
        values = (
            chunked_values(hidden, chunk, values_of, trained_head=trained_head)
            if chunked
            else values_of(hidden, slice(0, N))
        )
        loss = 0.37 * (torch.arange(1.0, N + 1) * values).sum() / 5 + (mix * mix).sum() + (head * head).sum()
        loss.backward()
        assert mix.grad is not None and (head.grad is not None) == trained_head
        results.append((values.detach(), mix.grad, head.grad if head.grad is not None else torch.zeros(0)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_gradient", [True, False])
def test_a_chunk_that_does_not_fit_into_memory_is_computed_in_halves(with_gradient: bool) -> None:
    """A real refusal of torch's allocator, for more than three rows; N rows are two halves of five and six."""
    calls: list[int] = []

    def refusing(largest: int) -> Callable[[torch.Tensor, slice], torch.Tensor]:
        def values_of(hidden: torch.Tensor, chunk: slice) -> torch.Tensor:
            calls.append(len(hidden))
            if len(hidden) > largest:
                torch.empty(1 << 50)
            return values_of_head(HEAD)(hidden, chunk)

        return values_of

    results = []
    for largest in (6, N):
        hidden = INPUT.clone().requires_grad_(with_gradient)
        values = chunked_values(hidden, N, refusing(largest))
        if with_gradient:
            values.sum().backward()
            assert hidden.grad is not None
        results.append((values.detach(), hidden.grad if with_gradient else values))
    assert calls == [N, 5, 6, N]
    for ours, whole in zip(*results, strict=True):
        torch.testing.assert_close(ours, whole, rtol=1e-6, atol=1e-6)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        chunked_values(INPUT, N, refusing(3))  # once, and no more

    def wrong(_hidden: torch.Tensor, _part: slice) -> torch.Tensor:
        calls.append(-1)
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes"):
        chunked_values(INPUT, N, wrong)
    assert calls.count(-1) == 1


@trained_or_not
def test_no_positions_give_a_zero_gradient_and_no_gradient_is_computed_in_vain(trained_head: bool) -> None:
    hidden, head = torch.zeros(0, H, requires_grad=True), HEAD.clone().requires_grad_(trained_head)
    values = chunked_values(hidden, 4, values_of_head(head), trained_head=trained_head)
    values.sum().backward()
    assert (values.shape, values.dtype) == ((0,), torch.float32)
    assert hidden.grad is not None and hidden.grad.shape == (0, H)
    with torch.no_grad():
        values = chunked_values(INPUT, 4, values_of_head(head), trained_head=trained_head)
    assert not values.requires_grad
    torch.testing.assert_close(values, values_of_head(HEAD)(INPUT, slice(0, N)))
