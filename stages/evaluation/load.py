"""Speed by the number of requests in flight: measured on servers, predicted for the embedded engine.

A prediction comes from acceptance by replay, and the time of a step at each number. A step takes the same time whatever
is accepted, so a few steps with empty caches measure it. An answer of L tokens, of which a step commits tau on average,
takes its share of an engine with N requests in flight:

    prefill + (L - 1) / tau(w) · step(N, w) / N

w: tokens that a step verifies for each request. Without a drafter w and tau are 1. L is that of the timed runs, and
prefill the time that a prompt of median length takes alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import TypeAlias

import numpy as np

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
from draftsmith.stages.evaluation.speed_embedded import Decoder, EmbeddedSpeedTest
from draftsmith.stages.evaluation.timed_runs import Row, Setting
from draftsmith.stages.evaluation.verdicts import estimate_of, estimate_record
from draftsmith.stages.replay.trace import AcceptanceStats
from draftsmith.stages.runtime.memory import out_of_memory, release_memory
from draftsmith.stages.runtime.statistics import Estimate, combine_errors, jackknife, mean_estimate, sum_by_key

IN_FLIGHT = (1, 2, 4, 8, 16, 32, 64, 128)
PASSES = 5  # over all arms and widths, after one that is not counted
SHARE = 0.15  # of the time of the timed runs, which the steps may take
Cell: TypeAlias = tuple[str, int]  # arm, and tokens verified for each request
StepSeconds: TypeAlias = Mapping[int, Mapping[Cell, np.ndarray]]  # requests in flight -> cell -> [passes]


@dataclass(frozen=True)
class AverageAnswer:
    """The mean answer at one setting."""

    tokens: float
    prefill: Mapping[str, float]  # arm -> seconds

    @classmethod
    def measure(
        cls,
        test: EmbeddedSpeedTest,
        drafters: Mapping[str, Drafter],
        answers: Sequence[Trajectory],
        setting: Setting,
        runs: Sequence[Row],
    ) -> AverageAnswer:
        """Time the prefill of a prompt of median length with each drafter. runs: timed ones at this setting."""
        lengths = [each.prompt_length for each in answers]
        prompt = answers[int(np.argsort(lengths)[len(lengths) // 2])]
        sampling = test.config.sampling.params(setting.temperature)
        request = Request("0", prompt.tokens[: prompt.prompt_length], 2, sampling, adapter=prompt.adapter)
        decoders = {PLAIN: Decoder()} | {arm: Decoder(each, each.block_size) for arm, each in drafters.items()}
        timers = {
            arm: test.engine(test.target, decoder, 1, prompt.prompt_length + 2).prefill_timer(request)
            for arm, decoder in decoders.items()
        }
        passes = [{arm: timer() for arm, timer in timers.items()} for _ in range(1 + PASSES)][1:]
        tokens = sum(run["tokens"] for run in runs) / sum(run["prompts"] for run in runs)
        return cls(tokens, {arm: float(np.mean([each[arm] for each in passes])) for arm in timers})


def widths_of(block_size: int) -> list[int]:
    """Return the block sizes that are compared: powers of two, and the trained one."""
    return [*(size for size in (2, 4, 8, 16, 32) if size < block_size), block_size]


def measure_steps(
    test: EmbeddedSpeedTest,
    drafters: Mapping[str, Drafter],
    answers: Sequence[Trajectory],
    setting: Setting,
    timed_seconds: float,
) -> StepSeconds:
    """Return the times of steps with and without each drafter, measured in alternation, at every number in flight.

    The requests are where N that began at random times are on average. Fewer numbers are measured if memory ends, or
    after `SHARE` of `timed_seconds`, the time of the timed runs.
    """
    started = time.monotonic()
    trained = {arm: drafter.block_size for arm, drafter in drafters.items()}
    widest = max(trained.values())
    decoders = {(PLAIN, width): Decoder() for width in [1, *widths_of(widest)]}
    decoders |= {(arm, w): Decoder(drafters[arm], w) for arm, size in trained.items() for w in widths_of(size)}
    ends = sorted((end, row) for row, each in enumerate(answers) for end in range(each.prompt_length, len(each.tokens)))
    found: dict[int, dict[Cell, np.ndarray]] = {}
    for concurrency in IN_FLIGHT:
        chosen = [ends[int((n + 1) / (concurrency + 1) * len(ends))] for n in range(concurrency)]
        sampling = test.config.sampling.params(setting.temperature)
        requests = [
            Request(str(n), answers[row].tokens[:end], widest + 1, sampling, n, answers[row].adapter)
            for n, (end, row) in enumerate(chosen)
        ]
        longest = max(end for end, _ in chosen) + widest
        try:
            cache = test.target.new_cache(concurrency, longest)
            timers = {
                cell: test.engine(test.target, decoder, concurrency, longest).step_timer(requests, cell[1], cache)
                for cell, decoder in decoders.items()
            }
            passes = [_one_pass(timers, index) for index in range(1 + PASSES)][1:]
        except Exception as error:
            if not out_of_memory(error) or not found:
                raise
            break
        found[concurrency] = {cell: np.array([each[cell] for each in passes]) for cell in decoders}
        test.ctx.check_interrupted()
        if time.monotonic() - started > SHARE * timed_seconds:
            break
    release_memory()
    return found


def _one_pass(timers: Mapping[Cell, Callable[[], float]], index: int) -> dict[Cell, float]:
    """Return the seconds of a step of each cell; the order changes from pass to pass."""
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
    seconds: np.ndarray  # [passes] of a step, for one request
    committed: np.ndarray  # [units] tokens
    steps: np.ndarray  # [units]
    answer: AverageAnswer

    def answer_seconds(self, step: np.ndarray, committed: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Return the engine's time for one answer."""
        return self.answer.prefill[self.arm] + (self.answer.tokens - 1) * step * steps / committed

    @property
    def per_pass(self) -> np.ndarray:
        """Return the engine's time for one answer, of each pass."""
        return self.answer_seconds(self.seconds, self.committed.sum(), self.steps.sum())

    @property
    def tokens_per_s(self) -> float:
        return self.answer.tokens / float(self.per_pass.mean())


def _log_ratio(own: _Speed, other: _Speed) -> Estimate:
    """Return the logarithm of how many times as fast the first is as the other: the error of the passes and of tau."""

    def ratio(committed: np.ndarray, steps: np.ndarray, others: np.ndarray, other_steps: np.ndarray) -> np.ndarray:
        slow = other.answer_seconds(other.seconds.mean(), others, other_steps)
        return np.log(slow / own.answer_seconds(own.seconds.mean(), committed, steps))

    timed = mean_estimate(np.log(other.per_pass / own.per_pass))
    return combine_errors(timed, jackknife(ratio, own.committed, own.steps, other.committed, other.steps))


def predict(
    steps: StepSeconds, tallies: Mapping[str, AcceptanceStats], units: Sequence[str], answer: AverageAnswer
) -> list[LoadPoint]:
    """Return the speed of each drafter at every measured number of requests in flight, at its fastest width.

    Compared with decoding without a drafter, and with the champion if there is one. units: of the trajectories.
    """
    sums = {
        (arm, width): [sum_by_key(units, each) for each in tally.at_width(width)]
        for arm, tally in tallies.items()
        for width in widths_of(tally.block_size)
    }
    some = next(iter(sums.values()))[0]
    points = []
    for concurrency, cells in steps.items():
        speeds = {(PLAIN, 1): _Speed(PLAIN, 1, cells[PLAIN, 1] / concurrency, some, some, answer)}
        for (arm, width), (committed, taken) in sums.items():
            speeds[arm, width] = _Speed(arm, width, cells[arm, width] / concurrency, committed, taken, answer)
        best = {
            arm: max((s for s in speeds.values() if s.arm == arm), key=attrgetter("tokens_per_s"))
            for arm in [PLAIN, *tallies]
        }
        for arm in tallies:
            for other in [PLAIN, *([CHAMPION] if CHAMPION in tallies and arm != CHAMPION else [])]:
                estimate = estimate_record(_log_ratio(best[arm], best[other]))
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

    comparisons: of speed, at every setting. tables: of every setting.
    """
    arms = {each.concurrency: each.arms for each in tables if each.temperature == tables[0].temperature}
    points = [
        LoadPoint.model_validate(
            {
                **dict(estimate_record(estimate_of(each))),
                "arm": each.arm,
                "other": each.other,
                "concurrency": each.concurrency,
                "block_size": arms[each.concurrency][each.arm].block_size,
                "tokens_per_s": arms[each.concurrency][each.arm].tokens_per_s,
            }
        )
        for each in comparisons
        if each.temperature == tables[0].temperature
    ]
    return sorted(points, key=attrgetter("concurrency"))
