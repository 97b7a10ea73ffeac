"""Every loss against a plain float64 formula, and what must hold for all inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.stages.training import losses
from tests.lab import losses as lab
from tests.stages.training.reference import plain_bernoulli, plain_k3

logits = st.lists(st.floats(-8, 8, width=32), min_size=5, max_size=5)
any_logprob = st.floats(-60, 0, width=32)
TOLERANCE = 2e-5


def softmax(row: list[float]) -> list[float]:
    total = math.fsum(math.exp(x) for x in row)
    return [math.exp(x) / total for x in row]


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32)


@given(logits, st.integers(0, 4))
@settings(deadline=None)
def test_cross_entropy_is_minus_the_log_of_the_softmax(row: list[float], token: int) -> None:
    got = losses.cross_entropy(torch.tensor([row]), torch.tensor([token]))
    assert float(got) == pytest.approx(-math.log(softmax(row)[token]), abs=TOLERANCE)


@given(logits, logits)
@settings(deadline=None)
def test_forward_kl_is_the_sum_over_the_vocabulary(q_row: list[float], p_row: list[float]) -> None:
    q, p = softmax(q_row), softmax(p_row)
    expected = math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    got = float(losses.forward_kl(torch.tensor([q_row]), torch.tensor([p_row])))
    assert got == pytest.approx(expected, abs=TOLERANCE)
    assert got >= -TOLERANCE
    if max(abs(a - b) for a, b in zip(p, q, strict=True)) > 0.02:
        assert got > TOLERANCE  # Pinsker: at least 2 · 0.02²


def test_forward_kl_is_not_the_reverse_one_and_is_zero_where_p_is() -> None:
    q, p = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, -1e9]])  # p puts everything on the first token
    assert float(losses.forward_kl(q, p)) == pytest.approx(math.log(2), abs=TOLERANCE)


@given(logits, logits)
@settings(deadline=None)
def test_tv_and_lk_are_the_acceptance_probability(q_row: list[float], p_row: list[float]) -> None:
    """Leviathan et al., arXiv 2211.17192, theorem 3.5: a sample from q is accepted with probability Σ min(p, q)."""
    acceptance = math.fsum(min(a, b) for a, b in zip(softmax(p_row), softmax(q_row), strict=True))
    q, p = torch.tensor([q_row]), torch.tensor([p_row])
    assert float(losses.total_variation(q, p)) == pytest.approx(1 - acceptance, abs=TOLERANCE)
    assert float(lab.tv(q, p.log_softmax(-1))) == pytest.approx(1 - acceptance, abs=TOLERANCE)
    assert float(lab.lk(q, p.log_softmax(-1))) == pytest.approx(-math.log(acceptance), rel=1e-5, abs=TOLERANCE)


@given(logits, logits, st.sampled_from(["forward_kl", "total_variation"]))
@settings(deadline=None)
def test_gradients_are_those_of_the_plain_formulas(q_row: list[float], p_row: list[float], name: str) -> None:
    """By central differences of the float64 formula, away from the kinks of min and |·|."""
    p = softmax(p_row)
    if min(abs(a - b) for a, b in zip(p, softmax(q_row), strict=True)) < 1e-4:
        return

    def plain(row: list[float]) -> float:
        pairs = list(zip(p, softmax(row), strict=True))
        return {
            "forward_kl": lambda: math.fsum(a * math.log(a / b) for a, b in pairs),
            "total_variation": lambda: math.fsum(abs(a - b) for a, b in pairs) / 2,
        }[name]()

    q = torch.tensor([q_row], requires_grad=True)
    log_p = torch.tensor([p_row]).log_softmax(-1)  # logits of p too
    getattr(losses, name)(q, log_p).sum().backward()
    assert q.grad is not None
    for i in range(len(q_row)):
        up, down = ([x + sign * 1e-5 * (j == i) for j, x in enumerate(q_row)] for sign in (1, -1))
        assert float(q.grad[0, i]) == pytest.approx((plain(up) - plain(down)) / 2e-5, abs=2e-4)


@given(logits)
@settings(deadline=None)
def test_temperature_zero_is_the_limit_of_small_ones(row: list[float]) -> None:
    x = torch.tensor([row])
    frozen = losses.at_temperature(x, 0).softmax(-1)
    assert frozen.tolist() == [[float(i == int(x.argmax())) for i in range(len(row))]]
    best = sorted(row)[-2:]
    if best[1] - best[0] > 0.05:
        torch.testing.assert_close(losses.at_temperature(x, 1e-3).softmax(-1), frozen)
    torch.testing.assert_close(losses.at_temperature(x, 2.0), x / 2)


@given(any_logprob, any_logprob)
@settings(deadline=None)
def test_bernoulli_forward_kl_is_its_formula(log_q: float, log_p: float) -> None:
    got = float(losses.bernoulli_forward_kl(one(log_q), one(log_p)))
    assert got == pytest.approx(plain_bernoulli(log_q, log_p), abs=2e-3)  # log(1-p) near p = 1 in float32
    assert -10 <= got <= 10


@given(any_logprob, any_logprob)
@settings(deadline=None)
def test_k3_is_its_formula_and_never_negative(log_q: float, log_p: float) -> None:
    got = float(losses.k3_reverse_kl(one(log_q), one(log_p)))
    assert got == pytest.approx(plain_k3(log_q, log_p), rel=1e-5, abs=2e-5)
    assert -1e-6 <= got <= 10


@pytest.mark.parametrize("loss", [losses.bernoulli_forward_kl, losses.k3_reverse_kl])
@pytest.mark.parametrize("log_q", [0.0, -1e-8, -0.5, -10.0, -50.0, -math.inf])
@pytest.mark.parametrize("log_p", [0.0, -1e-8, -0.5, -10.0, -50.0, -math.inf])
def test_value_and_gradient_are_finite_at_the_floors(loss: object, log_q: float, log_p: float) -> None:
    q = one(log_q).requires_grad_()
    value = loss(q, one(log_p))  # type: ignore[operator]
    value.sum().backward()
    assert value.isfinite().all()
    assert q.grad is not None
    assert q.grad.isfinite().all()
    assert abs(float(value.detach())) <= losses.TERM_LIMIT


@given(st.lists(st.floats(-6, 0), min_size=4, max_size=4), st.integers(1, 4), st.floats(0.01, 1))
@settings(deadline=None)
def test_d_pace_weights_are_what_an_offset_adds_to_the_expected_length(
    row: list[float], inside: int, alpha: float
) -> None:
    """By autograd, arXiv 2605.18810: the slope of Σ_i Π_{j≤i} q̃_j in log q̃_k, with q̃ = (1 - α) q + α."""
    smoothed = ((1 - alpha) * torch.tensor([row], dtype=torch.float64).exp() + alpha).log().requires_grad_()
    expected_length = torch.stack([smoothed[0, : i + 1].sum().exp() for i in range(inside)]).sum()
    expected_length.backward()
    assert smoothed.grad is not None
    log_q = torch.tensor([row], dtype=torch.float64)
    log_q[0, inside:] = 0
    weights = losses.d_pace_weights(log_q, torch.arange(4)[None] < inside, alpha)
    torch.testing.assert_close(weights[:, :inside], smoothed.grad[:, :inside])
    assert (weights[:, inside:] == 0).all()
    assert (weights[:, :inside].diff() <= 0).all()
    if alpha == 1:  # all offsets are thought certain: they count by how many follow
        assert weights[0, :inside].tolist() == list(range(inside, 0, -1))
