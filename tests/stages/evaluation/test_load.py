"""Speed by load: the exact formula for drafters of known survival, intervals that cover, timed runs, mixes of loads."""

from __future__ import annotations

import math

import numpy as np
import pytest

from draftsmith.artifacts.results.evaluation import CHAMPION, PLAIN, LoadPoint, SpeedMetrics, SpeedTable
from draftsmith.stages.evaluation.load import AverageAnswer, StepSeconds, from_timed_runs, predict, widths_of
from draftsmith.stages.evaluation.verdicts import at_loads, comparison, estimate_of
from draftsmith.stages.replay.trace import AcceptanceStats, Trace
from draftsmith.stages.runtime.statistics import Estimate
from tests.stages.evaluation.test_error_rates import allowed

BLOCK = 8
ANSWER = AverageAnswer(tokens=101, prefill={PLAIN: 0.02, "sft": 0.03, CHAMPION: 0.03})


def tally(rng: np.random.Generator, acceptance: float, answers: int, spread: float = 0.1) -> AcceptanceStats:
    """Return the acceptance of a drafter, each of whose proposals is accepted with the same probability.

    spread: how much easier or harder than others single answers are.
    """
    found, steps = AcceptanceStats(answers), 40
    for index, rate in enumerate(np.clip(acceptance + rng.uniform(-spread, spread, answers), 0, 1)):
        accepted = np.minimum(rng.geometric(1 - rate, steps) - 1, BLOCK - 1)
        anchors = 10 + np.concatenate([[0], np.cumsum(accepted + 1)[:-1]])
        length = int(anchors[-1] + accepted[-1] + 2)
        found.add([index], [Trace(length, anchors, accepted, np.zeros((steps, BLOCK - 1), int), steps)])
    return found


def step_seconds(concurrency: int, width: int, *, drafting: bool) -> float:
    """Return the time of a step: a fixed part, and one for each token."""
    return 0.01 + 0.0004 * concurrency * width + 0.002 * drafting


def measured(rng: np.random.Generator, noise: float = 0.0, arms: tuple[str, ...] = ("sft",)) -> StepSeconds:
    cells = [(PLAIN, 1), *((arm, width) for arm in arms for width in widths_of(BLOCK))]
    return {
        concurrency: {
            (arm, width): step_seconds(concurrency, width, drafting=arm != PLAIN) * np.exp(rng.normal(0, noise, 5))
            for arm, width in cells
        }
        for concurrency in (1, 4, 16, 64)
    }


def exact(acceptance: float, concurrency: int, width: int) -> float:
    """Return the speed-up of a drafter with this acceptance at all offsets."""
    tau = (1 - acceptance**width) / (1 - acceptance)
    plain = 0.02 + 100 * step_seconds(concurrency, 1, drafting=False) / concurrency
    return plain / (0.03 + 100 / tau * step_seconds(concurrency, width, drafting=True) / concurrency)


@pytest.mark.parametrize("acceptance", [0.4, 0.8])
def test_a_drafter_of_known_survival_has_the_exact_speed_and_block_size(acceptance: float) -> None:
    rng = np.random.default_rng(0)
    stats = tally(rng, acceptance, 2000, spread=0)
    points = predict(measured(rng), {"sft": stats}, [str(n) for n in range(2000)], ANSWER)
    for point in points:
        speeds = {width: exact(acceptance, point.concurrency, width) for width in widths_of(BLOCK)}
        assert point.block_size == max(speeds, key=speeds.__getitem__)
        assert math.exp(point.value) == pytest.approx(speeds[point.block_size], rel=0.01)
        plain = 101 / (0.02 + 100 * step_seconds(point.concurrency, 1, drafting=False) / point.concurrency)
        assert point.tokens_per_s == pytest.approx(plain * math.exp(point.value))
    assert len({point.block_size for point in points}) > 1, "large blocks pay with few requests in flight alone"


def test_intervals_cover_the_true_speed_up() -> None:
    rng, repetitions, missed = np.random.default_rng(1), 300, 0
    truth = predict(measured(rng), {"sft": tally(rng, 0.7, 3000)}, [str(n) for n in range(3000)], ANSWER)
    for _ in range(repetitions):
        points = predict(measured(rng, 0.03), {"sft": tally(rng, 0.7, 24)}, [str(n) for n in range(24)], ANSWER)
        low, high = estimate_of(points[1]).interval() or (0, 0)
        missed += not low <= truth[1].value <= high
    assert missed / repetitions <= allowed(repetitions)


def test_the_champion_is_compared_on_the_same_answers() -> None:
    rng = np.random.default_rng(2)
    stats = tally(rng, 0.7, 20)
    steps = measured(rng, arms=("sft", CHAMPION))
    points = predict(steps, {"sft": stats, CHAMPION: stats}, [str(n) for n in range(20)], ANSWER)
    compared = [(point.value, point.error) for point in points if point.other == CHAMPION]
    assert compared == [(pytest.approx(0), pytest.approx(0))] * 4


def test_timed_runs_at_the_first_temperature_are_points_in_ascending_order() -> None:
    settings = [(temperature, concurrency) for temperature in (1.0, 0.0) for concurrency in (16, 1)]
    compared = [
        comparison(
            "speed", pair, Estimate(n / 100, math.nan if pair[0] == CHAMPION else 0.1, 5, 4),
            temperature=temperature, concurrency=n,
        )
        for temperature, n in settings
        for pair in (("sft", PLAIN), ("sft", CHAMPION), (CHAMPION, PLAIN))
    ]  # fmt: skip
    tables = [
        SpeedTable(
            temperature=temperature,
            concurrency=n,
            arms={arm: SpeedMetrics(tokens_per_s=n + temperature, block_size=size) for arm, size in sizes.items()},
        )
        for temperature, n in settings
        for sizes in [{"sft": 6, CHAMPION: 8}]
    ]
    points = from_timed_runs(compared, tables)
    assert [(point.arm, point.other, point.concurrency, point.block_size) for point in points] == [
        (*pair, n, size)
        for n in (1, 16)
        for *pair, size in (("sft", PLAIN, 6), ("sft", CHAMPION, 6), (CHAMPION, PLAIN, 8))
    ]
    assert [(point.value, point.tokens_per_s) for point in points[::3]] == [(0.01, 2), (0.16, 17)]
    assert [(point.error, point.units, point.degrees) for point in points[:3]] == [
        (0.1, 5, 4),
        (0.1, 5, 4),
        (None, 5, 4),
    ]


def curve(*points: tuple[int, float, float]) -> list[LoadPoint]:
    """Return a curve. points: requests in flight, tokens/s, and how many times as fast as the other arm."""
    return [
        LoadPoint(
            value=math.log(factor), error=0.01, units=5, degrees=4, arm="sft", other=PLAIN, concurrency=n,
            block_size=8, tokens_per_s=speed,
        )
        for n, speed, factor in points
    ]  # fmt: skip


def test_a_mix_of_loads_is_weighted_by_the_time_at_each() -> None:
    found = at_loads(curve((1, 100, 2.0), (4, 200, 1.0), (16, 400, 0.5)), {1: 3, 4: 1})
    assert found is not None
    estimate, tokens_per_s = found
    assert tokens_per_s == pytest.approx((3 * 100 + 200) / 4)
    assert math.exp(estimate.value) == pytest.approx((3 * 100 + 200) / (3 * 50 + 200))
    assert (estimate.error, estimate.degrees) == (pytest.approx(0.01), 4)


def test_loads_between_the_points_are_interpolated_and_beyond_them_unknown() -> None:
    points = curve((1, 100, 2.0), (4, 200, 1.0))
    found = at_loads(points, {2: 1})
    assert found is not None
    assert math.exp(found[0].value) == pytest.approx(2**0.5) and found[1] == pytest.approx(100 * 2**0.5)
    assert at_loads(points, {1: 1, 5: 1}) is None
    assert at_loads(points[1:], {1: 1, 4: 1}) is None
    assert at_loads(points[1:], {4: 1}) == (estimate_of(points[1]), pytest.approx(200))
    assert at_loads([], {1: 1}) is None
