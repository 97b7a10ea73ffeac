"""What must hold of losses for all inputs; `test_block_losses.py` compares each with a plain float64 formula."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.stages.training import losses
from draftsmith.stages.training.loss_registry import LOSSES
from draftsmith.stages.training.response_loss import FUNCTIONS
from tests.stages.training.reference import plain_bernoulli, plain_k3

logits = st.lists(st.floats(-8, 8, width=32), min_size=5, max_size=5)
any_logprob = st.floats(-60, 0, width=32)


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float32)


def test_every_named_loss_has_a_function() -> None:
    assert FUNCTIONS.keys() == LOSSES.keys()


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
