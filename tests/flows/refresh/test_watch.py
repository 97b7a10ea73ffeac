"""Tau that servers count is compared with the champion's at its promotion."""

from __future__ import annotations

import numpy as np
import pytest

from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.evaluation import ALL
from draftsmith.flows.refresh.watch import compare
from draftsmith.stages.engines.served import served_tau
from draftsmith.stages.engines.servers.state import Finished
from tests.flows.refresh.test_drift import measured, now
from tests.stages.evaluation.test_error_rates import allowed


def served(rng: np.random.Generator, requests: float, share: float = 1.0) -> SetMetrics:
    """Return tau of about so many requests in 30 windows, which are as those of `measured`, with tau times `share`."""
    windows = []
    for count in rng.poisson(requests / 30, 30):
        tau = np.clip(np.exp(rng.normal(1.0, 0.3, count)) * share, 1.02, None)
        committed = rng.lognormal(5, 0.5, count)
        if count:
            windows.append(Finished(count, committed.sum(), (committed / tau).sum()))
    return served_tau(windows)


@pytest.mark.parametrize("requests", [10, 60, 3000])
@pytest.mark.parametrize("prompts", [16, 150])
def test_equal_tau_is_seldom_below(requests: int, prompts: int) -> None:
    """Even if the champion may have lost nothing."""
    rng, repetitions = np.random.default_rng(requests + prompts), 200
    alarms = [
        compare(served(rng, requests), measured(rng, 1, prompts)[ALL], 0.0)[0] == "below" for _ in range(repetitions)
    ]
    assert sum(alarms) / repetitions <= allowed(repetitions)


def test_a_fall_of_a_tenth_is_seen_in_a_thousand_requests() -> None:
    rng, repetitions = np.random.default_rng(0), 50
    seen = [compare(served(rng, 1000, 0.9), measured(rng, 1, 300)[ALL], 0.03)[0] == "below" for _ in range(repetitions)]
    assert sum(seen) / repetitions > 0.8


@pytest.mark.parametrize(
    ("tau", "outcome"),
    [
        (now(3.9, 0.05), "promised"),
        (now(3.9, 0.5), "promised"),
        (now(3.8, 0.5), "inconclusive"),
        (now(3.5, 0.1), "below"),
        (now(3.5, 0.1).model_copy(update={"prompts": 3}), "inconclusive"),
        (SetMetrics(prompts=0), "inconclusive"),
    ],
)
def test_tau_may_fall_by_the_threshold(tau: SetMetrics, outcome: str) -> None:
    assert compare(tau, now(4.0, 0.05), 0.03)[0] == outcome


@pytest.mark.parametrize("promised", [None, SetMetrics(tau=4.0, prompts=1)])
def test_a_promotion_without_an_interval_promises_nothing(promised: SetMetrics | None) -> None:
    assert compare(now(1.0, 0.01), promised, 0.03)[0] == "inconclusive"
