"""Predicted against measured speed at 1 to 32 requests in flight, on the test bed with three drafters.

Measured are engines whose slots are refilled from an endless queue. They take turns, and in the middle the stage
`evaluation` times its steps, so that other work on the machine slows all alike. A turn is an answer for each slot.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.artifacts.results.evaluation import PLAIN, LoadPoint
from draftsmith.stages.data.stored_prompts import Prompt, load_prompts
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, Trajectory, load_trajectories
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.engines.base import Completion, Request
from draftsmith.stages.evaluation import load_curve
from draftsmith.stages.evaluation.config import EvaluationConfig
from draftsmith.stages.evaluation.load_curve import Cell, measure_times, predict, widths_of
from draftsmith.stages.evaluation.speed_embedded import Decoder, EmbeddedSpeedTest
from draftsmith.stages.evaluation.timed_runs import Setting
from draftsmith.stages.evaluation.verdicts import estimate_of
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.steps import AcceptanceStats
from draftsmith.stages.targets.causal_lm import Target
from tests.benchmarks import harness
from tests.testbed import cache
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import drafter_artifacts
from tests.testbed.eagle3 import trained_eagle3
from tests.testbed.make import ANSWER_TOKENS, train_dflash

IN_FLIGHT = (1, 2, 4, 8, 16, 32)
FEWEST_ANSWERS = 8  # of a turn


def drafter_folders() -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the inputs of an evaluation, and arm -> artifact of three drafters: one good, one weak, one EAGLE-3."""
    made = drafter_artifacts()

    def build(folder: Path) -> None:
        train_dflash(made, folder / "drafter", steps=100)

    weak = cache.cached("weak-drafter", build, extra=made.root.name) / "drafter"
    drafters = {"dflash": made.drafter, "weak": weak, "eagle3": trained_eagle3()}
    return {"target": made.target, "prompts": made.prompts, "trajectories": made.heldout}, drafters


@dataclass
class EndlessRun:
    """An engine whose queue never ends, and what it did so far."""

    completions: Iterator[Completion]
    tokens: int = 0
    steps: int = 0
    answers: int = 0
    seconds: float = 0.0

    def turn(self, answers: int) -> None:
        """Decode until this many more answers are finished."""
        started = time.perf_counter()
        for done in itertools.islice(self.completions, answers):
            self.tokens += len(done.response_ids)
            self.steps += done.verify_steps
            self.answers += 1
        self.seconds += time.perf_counter() - started

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    @property
    def tau(self) -> float:
        """Return the tokens that a verify step committed."""
        return (self.tokens - self.answers) / self.steps


@dataclass(frozen=True)
class Benchmark:
    """All that decodes, and the answers that acceptance was replayed on."""

    test: EmbeddedSpeedTest
    drafters: Mapping[str, Drafter]
    tallies: Mapping[str, AcceptanceStats]
    answers: Sequence[Trajectory]
    prompts: Sequence[Prompt]

    @property
    def decoders(self) -> dict[Cell, Decoder]:
        """Return every arm at every width."""
        drafters = self.drafters.items()
        own = {(arm, width): Decoder(each, width) for arm, each in drafters for width in widths_of(each.block_size)}
        return {(PLAIN, 1): Decoder(), **own}

    def answer_tokens(self) -> dict[str, int]:
        """Return what a timed run would say of the answers."""
        tokens = sum(len(each.tokens) - each.prompt_length for each in self.answers)
        return {"tokens": tokens, "prompts": len(self.answers)}

    def predict(self) -> list[LoadPoint]:
        """Return the predicted speed of each drafter, compared with none, as in stage `evaluation`."""
        load_curve.IN_FLIGHT = IN_FLIGHT
        setting = Setting(self.test.config.sampling.temperature, 1)
        times = measure_times(self.test, self.drafters, self.answers, setting, [self.answer_tokens()], float("inf"))
        return predict(times[0], self.tallies, [str(n) for n in range(len(self.answers))], times[1])

    def endless(self, decoder: Decoder, slots: int) -> EndlessRun:
        """Return an engine that has all slots full, with requests that did not begin together."""
        test, prompts, most = self.test, self.prompts, self.test.config.sampling.max_new_tokens
        engine = test.engine(test.target, decoder, slots, max(len(each.token_ids) for each in prompts) + most)
        mean = self.answer_tokens()["tokens"] // len(self.answers)
        first = (1 + (n + 1) * mean // (slots + 1) for n in range(slots))  # tokens
        limits = itertools.chain(first, itertools.repeat(most))
        asked = zip(itertools.count(), itertools.cycle(prompts), limits)
        run = EndlessRun(engine.generate(Request(str(n), each.token_ids, limit) for n, each, limit in asked))
        run.turn(slots)
        return replace(run, tokens=0, steps=0, answers=0, seconds=0.0)

    def measure(self, rounds: int) -> tuple[list[LoadPoint], dict[int, dict[Cell, EndlessRun]]]:
        """Return the predictions, and the runs by number in flight and cell."""
        decoders = self.decoders.items()
        runs = {slots: {cell: self.endless(each, slots) for cell, each in decoders} for slots in IN_FLIGHT}
        points: list[LoadPoint] = []
        for index in range(rounds):
            if index == rounds // 2:
                points = self.predict()
            for slots, by_cell in runs.items():
                for run in list(by_cell.values())[:: -1 if index % 2 else 1]:
                    run.turn(max(FEWEST_ANSWERS, slots))
        return points, runs


def row(point: LoadPoint, runs: Mapping[Cell, EndlessRun]) -> dict[str, Any]:
    """Return the prediction of one arm at one number in flight next to the measured value."""
    low, high = np.exp(estimate_of(point).interval() or (np.nan, np.nan))
    plain = runs[PLAIN, 1].tokens_per_s
    own = {width: run.tokens_per_s / plain for (arm, width), run in runs.items() if arm == point.arm}
    measured, predicted = own[point.block_size], float(np.exp(point.value))
    return {
        "drafter": point.arm,
        "in flight": point.concurrency,
        "block": point.block_size,
        "predicted": predicted,
        "low": float(low),
        "high": float(high),
        "measured": measured,
        "inside": bool(low <= measured <= high),
        "error": predicted / measured - 1,
        "best block": max(own, key=own.__getitem__),
        "lost by the block": 1 - measured / max(own.values()),
    }


def main() -> None:
    options = harness.parser(__doc__, repetitions=8)
    harness.add_clock(options)
    chosen = harness.parsed(options)
    inputs, folders = drafter_folders()
    config = EvaluationConfig.model_validate({"sampling": {"max_new_tokens": ANSWER_TOKENS}})
    target = Target.load(inputs["target"])
    drafters = {arm: load_drafter(path / DRAFTER_FOLDER, target) for arm, path in folders.items()}
    answers = load_trajectories(inputs["trajectories"], ["heldout"]).trajectories
    tallies = Replayer(target).acceptance(drafters, answers)
    with tempfile.TemporaryDirectory() as folder:
        test = EmbeddedSpeedTest(RecordingContext.under(Path(folder), inputs), target, config, 0)
        bench = Benchmark(test, drafters, tallies, answers, load_prompts(inputs["prompts"], ["heldout"]))
        points, runs = bench.measure(chosen.repetitions)
    rows = [row(point, runs[point.concurrency]) for point in points]
    harness.print_rows("speed-up over no drafter", rows)
    by_width = []
    for (arm, width), run in list(runs[IN_FLIGHT[-1]].items())[1:]:
        committed, steps = tallies[arm].at_width(width)
        by_width.append([arm, width, float(committed.sum() / steps.sum()), run.tau])
    harness.print_table("tokens a step", ["drafter", "block", "predicted", "decoded"], by_width)
    summary = {
        "inside": float(np.mean([each["inside"] for each in rows])),
        "mean error": float(np.mean(np.abs([each["error"] for each in rows]))),
        "block within 3 %": float(np.mean([each["lost by the block"] <= 0.03 for each in rows])),
    }
    harness.print_table("in all", list(summary), [list(summary.values())])
    harness.report("load", {"rows": rows, "summary": summary}, chosen)


if __name__ == "__main__":
    harness.run(main)
