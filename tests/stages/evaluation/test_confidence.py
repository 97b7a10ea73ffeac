"""Calibration of a confidence against plain references, and by heads that are wrong by a known factor."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression  # type: ignore[import-untyped]

from draftsmith.stages.evaluation.acceptance import calibration, expected_calibration_error, fit
from draftsmith.stages.replay.steps import AcceptanceStats, Decisions, Steps


def drawn(logits: np.ndarray, scale: float, shift: float, seed: int = 0) -> Decisions:
    """Return decisions that are accepted with the probability of scale · logit + shift."""
    accepted = np.random.default_rng(seed).random(len(logits)) < expit(scale * logits + shift)
    return Decisions(logits, accepted)


def spread(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + 100).normal(1.5, 3, count)


@pytest.mark.parametrize("count", [30, 5000])
def test_the_fit_is_that_of_a_logistic_regression_on_platts_targets(count: int) -> None:
    """A target between 0 and 1 is, to a regression on labels, both labels with weights; within 1e-4."""
    decisions = drawn(spread(count), 0.4, -0.7)
    positive = decisions.accepted.sum()
    targets = np.where(decisions.accepted, (positive + 1) / (positive + 2), 1 / (count - positive + 2))
    plain = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(
        np.tile(decisions.logits, 2)[:, None],
        np.repeat([True, False], count),
        sample_weight=np.concatenate([targets, 1 - targets]),
    )
    assert fit(decisions) == pytest.approx((plain.coef_[0, 0], plain.intercept_[0]), abs=1e-4)


@pytest.mark.parametrize(("scale", "shift"), [(0.25, 0.0), (0.5, -1.0), (3.0, 0.5)])
def test_a_confidence_that_is_wrong_by_a_known_factor_is_corrected(scale: float, shift: float) -> None:
    """Its logits are too large by 1 / scale. 40,000 decisions know scale and shift within 5 %."""
    found = calibration(drawn(spread(40_000), scale, shift, 1), drawn(spread(40_000, 2), scale, shift, 3))
    assert found is not None
    assert (found.scale, found.shift) == (pytest.approx(scale, rel=0.05), pytest.approx(shift, abs=0.05))
    assert found.error_calibrated < 0.01 < found.error and (found.fitted_on, found.decisions) == (40_000, 40_000)
    if scale < 1:  # and most logits are positive
        assert found.confidence > found.accepted, "over-confident"


def test_no_data_leads_to_an_infinite_correction() -> None:
    certain = Decisions(spread(50), np.ones(50, dtype=bool))
    apart = Decisions(np.linspace(-1, 1, 50), np.linspace(-1, 1, 50) > 0)
    untrained = Decisions(np.zeros(50), np.arange(50) < 10)
    assert all(np.isfinite(fit(each)).all() for each in (certain, apart, untrained))
    assert expit(fit(untrained)[1]) == pytest.approx(0.2, abs=0.02), "a head of zeros learns the share accepted"
    none = Decisions(np.zeros(0), np.zeros(0, dtype=bool))
    assert calibration(none, certain) is calibration(certain, none) is None


def test_the_error_is_that_of_a_plain_loop() -> None:
    rng = np.random.default_rng(0)
    probabilities = np.concatenate([rng.random(500), np.arange(16) / 15, [0.0, 1.0]])
    accepted = rng.random(len(probabilities)) < probabilities**2
    error = 0.0
    for m in range(1, 16):
        in_bin = [
            i
            for i, p in enumerate(probabilities)
            if (m - 1) / 15 < p <= m / 15 or (m == 1 and p == 0)
        ]  # fmt: skip
        if in_bin:
            accuracy = sum(accepted[i] for i in in_bin) / len(in_bin)
            error += len(in_bin) / len(probabilities) * abs(accuracy - sum(probabilities[in_bin]) / len(in_bin))
    assert expected_calibration_error(probabilities, accepted) == pytest.approx(error, abs=1e-12)
    assert expected_calibration_error(np.array([1.0, 1.0]), np.array([True, False])) == 0.5


def test_decisions_end_at_the_first_rejected_proposal_and_at_the_end_of_the_answer() -> None:
    """K = 3: one proposal rejected at offset 2, all accepted, and one step of which a single proposal is inside."""
    logits = np.arange(9, dtype=np.float32).reshape(3, 3)
    trace = Steps(11, np.array([3, 5, 9]), np.array([1, 3, 0]), np.zeros((3, 3), int), confidence=logits)
    tally = AcceptanceStats(2)
    tally.add([1, 0], [trace, Steps(5, np.array([4]), np.array([0]), np.zeros((1, 3), int))])
    assert tally.decisions.logits.tolist() == [0, 1, 3, 4, 5, 6]
    assert tally.decisions.accepted.tolist() == [True, False, True, True, True, False]
    assert len(AcceptanceStats(1).decisions.logits) == 0
