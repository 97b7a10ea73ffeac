"""Speed by the number of requests in flight: measured on servers, predicted for the embedded engine.

A prediction comes from acceptance by replay, and the time of a step at each number. The time of a step does not depend
on acceptance, so a few steps with empty caches measure it. If several answers end in one step, the prompts that follow
them share a forward. An engine with N requests in flight takes for an answer of L tokens, of which a step commits tau
on average:

    S = (L - 1) / tau(w)                              steps of an answer
    step(N, w) · S / N + E[refill(K)] · S / N         K ~ Binomial(N, 1 / S): answers that end in a step

w: tokens that a step verifies per request. Without a drafter w and tau are 1. L comes from the timed runs.
refill(k): the time of reading k prompts, as many as `PREFILL_TOKENS` allow in one forward; for more, in proportion.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeAlias, TypeVar

import numpy as np
from scipy.special import binom

from draftsmith.artifacts.results.evaluation import (
    CHAMPION,
    PLAIN,
    ArmComparison,
    LoadPoint,
    SpeedTable,
    StepTime,
)
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.engines.base import Request
from draftsmith.stages.engines.embedded import PREFILL_TOKENS
from draftsmith.stages.evaluation.speed_embedded import Decoder, EmbeddedSpeedTest
from draftsmith.stages.evaluation.timed_runs import Row, Setting
from draftsmith.stages.evaluation.verdicts import estimate_of, estimate_record
from draftsmith.stages.replay.steps import AcceptanceStats
from draftsmith.stages.runtime.memory import out_of_memory, release_memory
from draftsmith.stages.runtime.statistics import (
    Estimate,
    combine_errors,
    jackknife,
    mean_estimate,
    strata_of,
    sum_by_key,
)

IN_FLIGHT: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128)
PASSES = 5  # over all arms and widths, after one uncounted pass
SHARE = 0.15  # limit for the steps, as a share of the time of the timed runs
Cell: TypeAlias = tuple[str, int]  # arm, and tokens verified per request
T = TypeVar("T")
StepSeconds: TypeAlias = Mapping[int, Mapping[Cell, np.ndarray]]  # requests in flight -> cell -> [passes]


@dataclass(frozen=True)
class AverageAnswer:
    """The mean answer at one setting, and the cost of its prompt."""

    tokens: float
    together: Sequence[int]  # numbers of prompts that are read together, ascending from 1
    refill: Mapping[str, np.ndarray]  # arm -> [passes, together] seconds

    def refill_seconds(self, arm: str, most: int) -> np.ndarray:
        """Return [passes, most + 1] the time of reading 0, 1, …, `most` prompts."""
        ended, largest = np.arange(most + 1), self.together[-1]
        times = np.array([np.interp(ended, [0, *self.together], [0, *seconds]) for seconds in self.refill[arm]])
        return times * np.maximum(1, ended / largest)


def _spread(items: Sequence[T], count: int) -> list[T]:
    """Return `count` items of a sorted list, spread like the average of random ones."""
    return [items[int((n + 1) / (count + 1) * len(items))] for n in range(count)]


def per_answer(refill: np.ndarray, concurrency: int, steps: np.ndarray) -> np.ndarray:
    """Return [...] prefill seconds amortised per answer of `steps` [...].

    refill: [concurrency + 1] the time of reading 0, 1, … prompts. Every request in flight ends in a step with the same
    probability.
    """
    ended, chance = np.arange(concurrency + 1), 1 / np.maximum(steps, 1)[..., None]
    probability = binom(concurrency, ended) * chance**ended * (1 - chance) ** (concurrency - ended)
    mean: np.ndarray = (probability * refill).sum(-1) / (concurrency * chance[..., 0])
    return mean


def widths_of(block_size: int) -> list[int]:
    """Return the block sizes to compare: powers of two, and the trained one."""
    return [*(size for size in (2, 4, 8, 16, 32) if size < block_size), block_size]


def measure_times(
    test: EmbeddedSpeedTest,
    drafters: Mapping[str, Drafter],
    answers: Sequence[Trajectory],
    setting: Setting,
    runs: Sequence[Row],
    timed_seconds: float,
) -> tuple[StepSeconds, AverageAnswer]:
    """Return the times of a step, with and without each drafter at every number in flight, and of reading prompts.

    A pass times all of them once, so that a slowdown of seconds shows in the spread of the passes. Fewer numbers are
    measured if memory runs out, or the passes would take more than `SHARE` of `timed_seconds`, the time of the timed
    runs. runs: the timed runs at this setting.
    """
    started = time.monotonic()
    trained = {arm: drafter.block_size for arm, drafter in drafters.items()}
    widest = max(trained.values())
    decoders = {(PLAIN, width): Decoder() for width in [1, *widths_of(widest)]}
    decoders |= {(arm, w): Decoder(drafters[arm], w) for arm, size in trained.items() for w in widths_of(size)}
    prompts = sorted((answer.prompt_length, row) for row, answer in enumerate(answers))
    ends = sorted(
        (end, row) for row, answer in enumerate(answers) for end in range(answer.prompt_length, len(answer.tokens))
    )
    together = [1 << n for n in range(max(1, PREFILL_TOKENS // prompts[len(prompts) // 2][0]).bit_length())]
    longest = prompts[-1][0] + widest + 1
    engines = {cell: test.engine(test.target, decoder, 1, longest) for cell, decoder in decoders.items()}
    sampling = test.config.sampling.params(setting.temperature)

    def request(row: int, end: int) -> Request:
        return Request(str(row), answers[row].tokens[:end], widest + 1, sampling, row)

    def time_refills(index: int, counts: Sequence[int]) -> dict[Cell, float]:
        """Return the seconds of reading prompts with each arm. The second part of a cell is their number here."""
        read = {count: [request(row, end) for end, row in _spread(prompts, count)] for count in counts}
        cache = test.target.new_cache(counts[-1], longest)
        timers = {
            (arm, count): engines[arm, trained.get(arm, 1)].refill_timer(requests, cache)
            for arm in [PLAIN, *drafters]
            for count, requests in read.items()
        }
        return _one_pass(timers, index)

    def time_steps(index: int, concurrency: int) -> dict[Cell, float]:
        """Return the seconds of a step of each cell, with requests advanced as if they began at random times."""
        requests = [request(row, end) for end, row in _spread(ends, concurrency)]
        cache = test.target.new_cache(concurrency, len(requests[-1].prompt_ids) + widest)
        return _one_pass({cell: engine.step_timer(requests, cell[1], cache) for cell, engine in engines.items()}, index)

    numbers = list(IN_FLIGHT)
    refills: list[dict[Cell, float]] = [{} for _ in range(1 + PASSES)]
    steps: dict[int, list[dict[Cell, float]]] = {number: [] for number in numbers}
    for index in range(1 + PASSES):
        for place, concurrency in enumerate(numbers):
            counts = [n for n in together if n <= concurrency and (PLAIN, n) not in refills[index]]
            try:
                if counts:
                    refills[index] |= time_refills(index, counts)
                steps[concurrency].append(time_steps(index, concurrency))
            except Exception as error:
                if not out_of_memory(error) or place == 0:
                    raise
                numbers = numbers[:place]
                break
            test.ctx.check_interrupted()
            if index == 0 and (1 + PASSES) * (time.monotonic() - started) > SHARE * timed_seconds:
                numbers = numbers[: place + 1]
                break
    release_memory()
    seconds = {n: {cell: np.array([times[cell] for times in steps[n][1:]]) for cell in engines} for n in numbers}
    tokens = sum(run["tokens"] for run in runs) / sum(run["prompts"] for run in runs)
    together = [count for count in together if count <= numbers[-1]]  # no more than these end in one step
    refill = {
        arm: np.array([[times[arm, count] for count in together] for times in refills[1:]])
        for arm in [PLAIN, *drafters]
    }
    return seconds, AverageAnswer(tokens, together, refill)


def _one_pass(timers: Mapping[Cell, Callable[[], float]], index: int) -> dict[Cell, float]:
    """Return the seconds of each cell; the order changes from pass to pass."""
    cells = list(timers)
    first = index * len(cells) // (1 + PASSES)
    return {cell: timers[cell]() for cell in (cells[first:] + cells[:first])[:: -1 if index % 2 else 1]}


def step_table(steps: StepSeconds) -> list[StepTime]:
    """Return the mean times of the steps."""
    return [
        StepTime(arm=arm, concurrency=concurrency, block_size=width, ms=1e3 * float(seconds.mean()))
        for concurrency, cells in steps.items()
        for (arm, width), seconds in cells.items()
    ]


@dataclass(frozen=True)
class _Speed:
    """An arm at one width and number of requests in flight."""

    arm: str
    width: int
    concurrency: int
    seconds: np.ndarray  # [passes] seconds of a step
    refill: np.ndarray  # [passes, concurrency + 1] seconds of reading 0, 1, … prompts
    committed: np.ndarray  # [units] tokens
    steps: np.ndarray  # [units]
    tokens: float  # of an answer

    def answer_seconds(self, step: float, refill: np.ndarray, committed: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Return the engine's time for one answer. committed, steps: [...]."""
        taken = np.asarray((self.tokens - 1) * steps / committed)
        return step * taken / self.concurrency + per_answer(refill, self.concurrency, taken)

    @property
    def per_pass(self) -> np.ndarray:
        """Return the engine's time for one answer as each pass measured it, [passes]."""
        sums = self.committed.sum(), self.steps.sum()
        passes = zip(self.seconds, self.refill, strict=True)
        return np.array([self.answer_seconds(step, refill, *sums) for step, refill in passes])

    def by_tau(self, committed: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Return the engine's time for one answer in the mean pass."""
        return self.answer_seconds(float(self.seconds.mean()), self.refill.mean(0), committed, steps)

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / float(self.per_pass.mean())


def _log_ratio(speed: _Speed, other: _Speed, strata: Sequence[Hashable]) -> Estimate:
    """Return the logarithm of the ratio of the two speeds, with the error of the passes and of tau.

    strata: [units].
    """

    def ratio(committed: np.ndarray, steps: np.ndarray, others: np.ndarray, other_steps: np.ndarray) -> np.ndarray:
        return np.log(other.by_tau(others, other_steps) / speed.by_tau(committed, steps))

    timed = mean_estimate(np.log(other.per_pass / speed.per_pass))
    return combine_errors(
        timed, jackknife(ratio, speed.committed, speed.steps, other.committed, other.steps, strata=strata)
    )


def predict(
    steps: StepSeconds, tallies: Mapping[str, AcceptanceStats], units: Sequence[Hashable], answer: AverageAnswer
) -> list[LoadPoint]:
    """Return the speed of each drafter at every measured number of requests in flight, at its fastest width.

    Compared with decoding without a drafter, and with the champion if there is one. units: the trajectories' units.
    """
    sums = {
        (arm, width): [sum_by_key(units, values) for values in tally.at_width(width)]
        for arm, tally in tallies.items()
        for width in widths_of(tally.block_size)
    }
    tokens = next(iter(sums.values()))[0]
    sums[PLAIN, 1] = [tokens, tokens]
    points = []
    for concurrency, cells in steps.items():
        refill = {arm: answer.refill_seconds(arm, concurrency) for arm in answer.refill}
        speeds = [
            _Speed(arm, width, concurrency, cells[arm, width], refill[arm], committed, taken, answer.tokens)
            for (arm, width), (committed, taken) in sums.items()
        ]
        best = {
            arm: max((s for s in speeds if s.arm == arm), key=attrgetter("tokens_per_s")) for arm in [PLAIN, *tallies]
        }
        for arm in tallies:
            for other in [PLAIN, *([CHAMPION] if CHAMPION in tallies and arm != CHAMPION else [])]:
                estimate = estimate_record(_log_ratio(best[arm], best[other], strata_of(units)))
                points.append(
                    LoadPoint(
                        **dict(estimate),
                        arm=arm,
                        other=other,
                        concurrency=concurrency,
                        block_size=best[arm].width,
                        tokens_per_s=best[arm].tokens_per_s,
                    )
                )
    return points


def from_timed_runs(comparisons: Sequence[ArmComparison], tables: Sequence[SpeedTable]) -> list[LoadPoint]:
    """Return the measured speeds at the temperature of the first table, fewest requests in flight first.

    comparisons: speeds at every setting. tables: one per setting.
    """
    arms = {table.concurrency: table.arms for table in tables if table.temperature == tables[0].temperature}
    points = [
        LoadPoint.model_validate(
            {
                **dict(estimate_record(estimate_of(comparison))),
                "arm": comparison.arm,
                "other": comparison.other,
                "concurrency": comparison.concurrency,
                "block_size": arms[comparison.concurrency][comparison.arm].block_size,
                "tokens_per_s": arms[comparison.concurrency][comparison.arm].tokens_per_s,
            }
        )
        for comparison in comparisons
        if comparison.temperature == tables[0].temperature
    ]
    return sorted(points, key=attrgetter("concurrency"))
