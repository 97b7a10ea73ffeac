"""Tau that servers count, or of requests that they trace, is compared with the champion's at its promotion."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.evaluation import ALL
from draftsmith.flows.refresh.versions import registry
from draftsmith.flows.refresh.watch import by_depth, compare, watch
from draftsmith.stages.engines.server_state import served_tau
from draftsmith.stages.engines.servers.state import Finished, TracedRequest
from draftsmith.stages.engines.sglang.protocol import REQUESTS_STATE, SWAP_STATE
from draftsmith.stages.evaluation.acceptance import tau_by_slice
from draftsmith.stages.replay.steps import DEPTHS
from tests.flows.refresh.test_drift import measured, now
from tests.flows.refresh.watched import DIGEST, promoted
from tests.stages.engines.http_server import serving
from tests.stages.evaluation.test_error_rates import allowed, simulated_slices

Metrics = Mapping[str, SetMetrics]


def served(rng: np.random.Generator, requests: float, share: float = 1.0) -> Metrics:
    """Return tau of about `requests` requests in 30 windows, distributed as in `measured`, with tau times `share`."""
    windows = []
    for count in rng.poisson(requests / 30, 30):
        tau = np.clip(np.exp(rng.normal(1.0, 0.3, count)) * share, 1.02, None)
        committed = rng.lognormal(5, 0.5, count)
        if count:
            windows.append(Finished(count, committed.sum(), (committed / tau).sum()))
    return {ALL: served_tau(windows)}


@pytest.mark.parametrize("requests", [10, 60, 3000])
@pytest.mark.parametrize("prompts", [16, 150])
def test_equal_tau_is_seldom_below(requests: int, prompts: int) -> None:
    """Even if the champion may have lost nothing."""
    rng, repetitions = np.random.default_rng(requests + prompts), 200
    alarms = [compare(served(rng, requests), measured(rng, 1, prompts), 0.0)[0] == "below" for _ in range(repetitions)]
    assert sum(alarms) / repetitions <= allowed(repetitions)


def test_a_fall_of_a_tenth_is_seen_in_a_thousand_requests() -> None:
    rng, repetitions = np.random.default_rng(0), 50
    seen = [compare(served(rng, 1000, 0.9), measured(rng, 1, 300), 0.03)[0] == "below" for _ in range(repetitions)]
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
    assert compare({ALL: tau}, {ALL: now(4.0, 0.05)}, 0.03)[0] == outcome


@pytest.mark.parametrize("promised", [{}, {ALL: SetMetrics(tau=4.0, prompts=1)}])
def test_a_promotion_without_an_interval_promises_nothing(promised: Metrics) -> None:
    unknown = ("inconclusive", "its tau at its promotion is unknown")
    assert compare({ALL: now(1.0, 0.01)}, promised, 0.03) == unknown
    assert compare(*by_depth([traced(below_1k=(10, 10))] * 9, promised)[:2], 0.03) == unknown


def traced(ended: int = 0, **depths: tuple[int, int]) -> TracedRequest:
    """Return a request with committed tokens and verify steps by depth, such as below_1k."""
    return TracedRequest(ended, {f"depth:{name.strip('_').replace('_', '-')}": sums for name, sums in depths.items()})


def simulated(
    rng: np.random.Generator, requests: int, context: float, deep: float = 0.6, fallen: str = ""
) -> list[TracedRequest]:
    """Return traced requests, with a fifth less tau at the depth `fallen`. deep: tau above 4k, as a factor."""
    stats = simulated_slices(rng, requests, above_4k=deep, context=context)[0]["opd"]
    steps = (stats.steps_at / [0.8 if depth == fallen else 1.0 for depth in DEPTHS]).round()
    rows = [
        dict(zip(DEPTHS, zip(*row, strict=True), strict=True)) for row in zip(stats.committed_at, steps, strict=True)
    ]
    found = [{depth: (int(c), int(s)) for depth, (c, s) in row.items() if s > 0} for row in rows]
    return [TracedRequest(0, depths) for depths in found if depths]


def promise(rng: np.random.Generator, prompts: int, deep: float = 0.6) -> Metrics:
    by_slice = tau_by_slice(*simulated_slices(rng, prompts, above_4k=deep))
    return {name: arms["opd"] for name, arms in by_slice.items()}


@pytest.mark.parametrize(
    ("prompts", "requests", "context"), [(16, 60, 2500), (144, 12, 7000), (144, 512, 7000), (400, 512, 2500)]
)
def test_an_unchanged_drafter_is_seldom_below(prompts: int, requests: int, context: float) -> None:
    """Whatever the depths of the requests, and even if it may have lost nothing. By the tau of all requests alone, the
    deeper ones are called below in two thirds of watches of 60 requests, and in 96 % of 512 (144 prompts)."""
    rng, repetitions = np.random.default_rng(requests + prompts), 150
    alarms = [
        compare(*by_depth(simulated(rng, requests, context), promise(rng, prompts))[:2], 0.0)[0] == "below"
        for _ in range(repetitions)
    ]
    assert sum(alarms) / repetitions <= allowed(repetitions)


def test_a_fall_of_a_fifth_at_one_depth_is_found_and_named() -> None:
    """Of 300 watches with 144 held-out prompts, 67 % find it by 60 requests, 82 % by 120, 95 % by 250."""
    rng, repetitions, depth = np.random.default_rng(0), 60, "depth:1k-4k"
    found = 0
    for _ in range(repetitions):
        requests = simulated(rng, 250, 2500, deep=1.0, fallen=depth)
        outcome, why = compare(*by_depth(requests, promise(rng, 144, deep=1.0))[:2], 0.03)
        found += outcome == "below" and depth in why
    assert found / repetitions > 0.85


def test_what_is_promised_over_all_is_that_of_the_requests_depths() -> None:
    requests = [traced(below_1k=(300, 100), _1k_4k=(200, 100)), traced(_1k_4k=(200, 100))] * 10
    promotion = {ALL: now(3.4, 0.1), "depth:below-1k": now(4.0, 0.1), "depth:1k-4k": now(2.0, 0.1), "chat": now(9, 0.1)}
    found, then, outside = by_depth(requests, promotion)
    assert {name: each.tau for name, each in found.items()} == pytest.approx(
        {ALL: 700 / 300, "depth:below-1k": 3.0, "depth:1k-4k": 2.0}
    )
    assert then[ALL].tau == pytest.approx(700 / (300 / 4 + 400 / 2)) and outside == 0
    outcome, why = compare(found, then, 0.03)
    assert outcome == "below" and "below: overall; depth:below-1k: tau 3.000 (at most" in why
    assert found["depth:below-1k"].prompts == 10 and found[ALL].prompts == 20


def test_steps_at_depths_that_were_not_measured_are_left_out() -> None:
    requests = [traced(below_1k=(300, 100), _4k_16k=(300, 300))] * 10
    measured_one = {ALL: now(3.0, 0.1), "depth:below-1k": now(3.0, 0.1), "depth:4k-16k": SetMetrics(tau=3.0, prompts=2)}
    found, then, outside = by_depth(requests, measured_one)
    assert found.keys() == {ALL, "depth:below-1k"} and outside == 0.75
    assert compare(found, then, 0.03)[0] == "promised"
    found, then, outside = by_depth(requests, {ALL: now(3.0, 0.1)})
    assert outside == 0 and found[ALL].tau == pytest.approx(1.5), "its tau of all prompts is all that is known"
    assert compare(found, then, 0.03)[0] == "below"
    deeper = by_depth([traced(_4k_16k=(300, 300))] * 10, measured_one)
    assert compare(*deeper[:2], 0.03)[0] == "inconclusive"


@pytest.fixture
def line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A line whose champion was promoted with a tau of 4, at depths below 1k and up to 4k."""
    monkeypatch.setenv("DRAFTSMITH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    version = promoted("a-line", "a", DIGEST, 4.0)
    metrics = now(4.0, 0.05).to_json()
    registry().tag(version, {"figures": json.dumps({ALL: metrics, DEPTHS[0]: metrics, DEPTHS[1]: metrics})})
    return "a-line"


@contextmanager
def server(requests: Mapping[str, Any] | None, digest: str = DIGEST, **options: Any) -> Iterator[str]:
    """Yield the address of a server of the champion. requests: its reported traces; None: none. options: its own."""
    state: dict[str, Any] = {SWAP_STATE: {"drafter": digest, "since": "", "before": "", "pause_s": 0.0, "proof": ""}}
    if requests is not None:
        state[REQUESTS_STATE] = requests
    reported = {"speculative_algorithm": "DFLASH", "speculative_num_draft_tokens": 8, "internal_states": [state, state]}
    with serving(lambda _: {}, server_info=lambda _: reported | options, metrics=lambda _: "") as running:
        yield running.url


def test_a_watch_takes_the_champions_traced_requests(line: str) -> None:
    """Of all replicas of all servers, at once; a mean that looks well hides no depth."""
    own = [[1780000000 + number, {DEPTHS[0]: [500 + number, 100], DEPTHS[1]: [30, 10]}] for number in range(20)]
    with server({DIGEST: own, "old": own[:2]}) as url, server({DIGEST: own}) as other:
        outcome, sentence = watch(line, [url, other], 60, 0.03)
    assert outcome == "below"
    assert "4.000 promised; measurably more than 3.0% below: depth:1k-4k: tau 3.000 (at most 3.000), 4.0" in (sentence)
    counted = f"(80 traced requests since 2026-05-28T20:26+00:00, without 4 of other drafters, of {url}, {other})"
    assert sentence.endswith(counted)


@pytest.mark.parametrize("requests", [None, {}, {"old": [[0, {DEPTHS[0]: [10, 10]}]] * 20}])
def test_without_traces_of_all_servers_a_watch_counts(line: str, requests: Mapping[str, Any] | None) -> None:
    with server(requests) as url:
        _, sentence = watch(line, [url], 0, 0.03)
    assert sentence == f"{line} version 1: too few requests ended (0 requests, of {url})"
    with server(requests) as url, server({DIGEST: [[0, {DEPTHS[0]: [10, 10]}]] * 20}) as other:
        _, mixed = watch(line, [url, other], 0, 0.03)
    assert mixed.startswith(f"{line} version 1: too few") == (requests is None)


@pytest.mark.parametrize("drafter", [None, "/target"])
def test_a_server_of_the_targets_own_head_serves_a_champion_that_is_one(line: str, drafter: str | None) -> None:
    """SGLang reports NEXTN as EAGLE; which head it is, its digest does not tell."""
    options = {"speculative_algorithm": "EAGLE", "speculative_draft_model_path": drafter, "model_path": "/target"}
    with server(None, "", **options) as url:
        outcome, sentence = watch(line, [url], 0, 0.03)
        assert outcome == "mismatched" and f"{url} serves the target's own head (NEXTN), and" in sentence
        champion = registry().champion(line)
        assert champion is not None
        registry().tag(champion, {"kind": "mtp"})
        assert watch(line, [url], 0, 0.03)[1].startswith(f"{line} version 1: too few requests ended")
