"""Speed by load: the exact formula, a simulated engine, intervals that cover, timed runs, mixes of loads."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from draftsmith.artifacts.results.evaluation import CHAMPION, PLAIN, LoadPoint, SpeedMetrics, SpeedTable
from draftsmith.stages.evaluation.load_curve import (
    AverageAnswer,
    StepSeconds,
    from_timed_runs,
    per_answer,
    predict,
    widths_of,
)
from draftsmith.stages.evaluation.verdicts import at_loads, comparison, estimate_of
from draftsmith.stages.replay.steps import AcceptanceStats, Steps
from draftsmith.stages.runtime.statistics import Estimate
from tests.stages.evaluation.test_error_rates import allowed

BLOCK = 8
FIRST, FURTHER = {PLAIN: 0.02, "sft": 0.03, CHAMPION: 0.03}, 0.005  # seconds of a prompt, and of each one read with it


def average_answer(rng: np.random.Generator, noise: float = 0.0) -> AverageAnswer:
    return AverageAnswer(
        tokens=101,
        together=(1, 64),
        refill={
            arm: np.array([first, first + 63 * FURTHER]) * np.exp(rng.normal(0, noise, (5, 2)))
            for arm, first in FIRST.items()
        },
    )


ANSWER = average_answer(np.random.default_rng(0))


def tally(rng: np.random.Generator, acceptance: float, answers: int, spread: float = 0.1) -> AcceptanceStats:
    """Return the acceptance of a drafter, each of whose proposals is accepted with the same probability.

    spread: how much easier or harder than others single answers are.
    """
    found, steps = AcceptanceStats(answers), 40
    for index, rate in enumerate(np.clip(acceptance + rng.uniform(-spread, spread, answers), 0, 1)):
        accepted = np.minimum(rng.geometric(1 - rate, steps) - 1, BLOCK - 1)
        anchors = 10 + np.concatenate([[0], np.cumsum(accepted + 1)[:-1]])
        length = int(anchors[-1] + accepted[-1] + 2)
        found.add([index], [Steps(length, anchors, accepted, np.zeros((steps, BLOCK - 1), int))])
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


def exact_speed(arm: str, acceptance: float, concurrency: int, width: int) -> float:
    """Return tokens/s of an arm with this acceptance at all offsets."""
    steps = 100 * (1 - acceptance) / (1 - acceptance**width)
    any_ends = 1 - (1 - 1 / steps) ** concurrency
    refill = (FIRST[arm] - FURTHER) * any_ends + FURTHER * concurrency / steps
    return 101 * concurrency / steps / (step_seconds(concurrency, width, drafting=arm != PLAIN) + refill)


@pytest.mark.parametrize("acceptance", [0.4, 0.8])
def test_a_drafter_of_known_survival_has_the_exact_speed_and_block_size(acceptance: float) -> None:
    rng = np.random.default_rng(0)
    stats = tally(rng, acceptance, 2000, spread=0)
    points = predict(measured(rng), {"sft": stats}, [str(n) for n in range(2000)], ANSWER)
    for point in points:
        speeds = {width: exact_speed("sft", acceptance, point.concurrency, width) for width in widths_of(BLOCK)}
        assert point.block_size == max(speeds, key=speeds.__getitem__)
        assert point.tokens_per_s == pytest.approx(speeds[point.block_size], rel=0.01)
        plain = exact_speed(PLAIN, 0, point.concurrency, 1)
        assert point.tokens_per_s == pytest.approx(plain * math.exp(point.value))
    assert len({point.block_size for point in points}) > 1, "large blocks pay only with few requests in flight"


def answer_trace(rng: np.random.Generator, acceptance: float, tokens: int) -> Steps:
    """Return the steps of an answer of this many tokens; its end cuts the last one."""
    accepted = np.minimum(rng.geometric(1 - acceptance, tokens) - 1, BLOCK - 1)
    anchors = np.concatenate([[0], np.cumsum(accepted + 1)[:-1]])
    inside = anchors < tokens - 1
    accepted, anchors = accepted[inside], anchors[inside]
    return Steps(tokens, anchors, accepted, np.zeros((len(anchors), BLOCK - 1), int))


@pytest.mark.parametrize("concurrency", [1, 4, 16, 64])
def test_an_engine_with_refilled_slots_has_the_predicted_speed(concurrency: int) -> None:
    """The slots of a simulated engine take random answers of a set; the tolerance is 2 %."""
    rng = np.random.default_rng(concurrency)
    lengths = rng.integers(51, 152, 300)
    traces = [answer_trace(rng, 0.8, int(tokens)) for tokens in lengths]
    step = step_seconds(concurrency, BLOCK, drafting=True)

    def choose(count: int) -> np.ndarray:
        return rng.integers(0, len(traces), count)

    steps = np.array([len(trace.anchors) for trace in traces])
    taken = choose(concurrency)
    left = 1 + (rng.uniform(size=concurrency) * steps[taken]).astype(int)
    seconds, tokens, ended = 0.0, 0, 0
    while ended < 2000 + 50 * concurrency:
        seconds, left = seconds + step, left - 1
        if (done := np.flatnonzero(left == 0)).size:
            tokens, ended = tokens + int(lengths[taken[done]].sum()), ended + done.size
            seconds += FIRST["sft"] + FURTHER * (done.size - 1)
            taken[done] = choose(done.size)
            left[done] = steps[taken[done]]

    stats = AcceptanceStats(len(traces))
    stats.add(range(len(traces)), traces)
    times = {(PLAIN, 1): np.full(5, step)} | {("sft", width): np.full(5, step) for width in widths_of(BLOCK)}
    mean_answer = replace(ANSWER, tokens=float(lengths.mean()))
    [point] = predict({concurrency: times}, {"sft": stats}, [str(n) for n in range(len(traces))], mean_answer)
    assert point.block_size == BLOCK
    assert point.tokens_per_s == pytest.approx(tokens / seconds, rel=0.02)


def test_prompts_beyond_one_forward_take_proportionally_longer() -> None:
    answer = AverageAnswer(101, (1, 2, 4), {PLAIN: np.array([[1.0, 1.5, 2.0]])})
    assert answer.refill_seconds(PLAIN, 8).tolist() == [[0, 1, 1.5, 1.75, 2, 2.5, 3, 3.5, 4]]
    assert per_answer(answer.refill_seconds(PLAIN, 1)[0], 1, np.array([5.0, 0.5])) == pytest.approx([1, 1])
    # of two requests with two steps each, none, one or both end in a step: 1/4, 1/2, 1/4
    assert per_answer(answer.refill_seconds(PLAIN, 2)[0], 2, np.array(2.0)) == pytest.approx(1 / 2 + 1.5 / 4)


def test_intervals_cover_the_true_speed_up() -> None:
    rng, repetitions, missed = np.random.default_rng(1), 300, 0
    truth = predict(measured(rng), {"sft": tally(rng, 0.7, 3000)}, [str(n) for n in range(3000)], ANSWER)
    for _ in range(repetitions):
        noisy = average_answer(rng, 0.03)
        points = predict(measured(rng, 0.03), {"sft": tally(rng, 0.7, 24)}, [str(n) for n in range(24)], noisy)
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
