"""Calibration of a drafter's confidence: how probable it says acceptance is, against what was accepted.

A decision is a proposal whose predecessors in its block were all accepted: a logit, and whether it was accepted too.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit

from draftsmith.artifacts.results.evaluation import ConfidenceCalibration
from draftsmith.stages.replay.trace import Decisions

BINS = 15


def calibration(validation: Decisions, heldout: Decisions) -> ConfidenceCalibration | None:
    """Fit the correction on validation answers, and measure it on held-out ones; None if either have no decision."""
    if not (len(validation.logits) and len(heldout.logits)):
        return None
    scale, shift = fit(validation)
    before, after = expit(heldout.logits), expit(scale * heldout.logits + shift)
    return ConfidenceCalibration(
        scale=scale,
        shift=shift,
        fitted_on=len(validation.logits),
        decisions=len(heldout.logits),
        confidence=float(before.mean()),
        accepted=float(heldout.accepted.mean()),
        error=expected_calibration_error(before, heldout.accepted),
        error_calibrated=expected_calibration_error(after, heldout.accepted),
    )


def fit(decisions: Decisions) -> tuple[float, float]:
    """Return scale and shift of the logit with the least log-loss.

    Source: Platt 1999, "Probabilistic outputs for support vector machines", with its targets: (N₊ + 1) / (N₊ + 2) for
    the N₊ accepted proposals and 1 / (N₋ + 2) for the rejected ones, so that the minimum is finite.
    """
    logits, accepted = decisions.logits, decisions.accepted
    targets = np.where(accepted, 1 - 1 / (accepted.sum() + 2), 1 / ((~accepted).sum() + 2))

    def loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        corrected = parameters[0] * logits + parameters[1]
        excess = expit(corrected) - targets
        gradient = np.array([(excess * logits).mean(), excess.mean()])
        return float((np.logaddexp(0, corrected) - targets * corrected).mean()), gradient

    scale, shift = minimize(loss, [1.0, 0.0], jac=True, method="BFGS", options={"gtol": 1e-9}).x
    return float(scale), float(shift)


def expected_calibration_error(probabilities: np.ndarray, accepted: np.ndarray) -> float:
    """Return Σ_m |B_m| / n · |share accepted in B_m - mean probability in B_m| over 15 bins B_m of equal width.

    Bin m holds probabilities in ((m - 1) / 15, m / 15]. Source: Guo et al. 2017 (arXiv 1706.04599, equation 3), for the
    probability of acceptance where theirs is of the predicted class.
    """
    bins = np.clip(np.ceil(BINS * probabilities).astype(int) - 1, 0, BINS - 1)
    return float(np.abs(np.bincount(bins, accepted - probabilities)).sum() / len(probabilities))
