"""Predicted against measured speed at 1 to 32 requests in flight, on the test bed with three drafters.

The prediction is that of the stage `evaluation`. Measured is an engine whose slots are refilled from a long queue, from
the time at which as many answers are finished as there are slots until the queue is empty.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.artifacts.results.evaluation import PLAIN, EvaluationResult, LoadPoint
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, Prompt, load_prompts, load_trajectories
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.engines.base import Request
from draftsmith.stages.evaluation import load
from draftsmith.stages.evaluation.config import PREFIX, EvaluationConfig
from draftsmith.stages.evaluation.load import Cell, widths_of
from draftsmith.stages.evaluation.speed_embedded import Decoder, EmbeddedSpeedTest
from draftsmith.stages.evaluation.stage import STAGE
from draftsmith.stages.evaluation.verdicts import estimate_of
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.target.causal_lm import Target
from tests.benchmarks import harness
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import TINY, drafter_artifacts
from tests.testbed.eagle3 import trained_eagle3
from tests.testbed.target import prompts_file, target_folder

IN_FLIGHT = (1, 2, 4, 8, 16, 32)
FEWEST_ANSWERS, ANSWERS_PER_SLOT = 60, 8


def drafter_folders() -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the inputs of an evaluation, and arm -> artifact of three drafters: one good, one weak, one EAGLE-3."""
    made = drafter_artifacts(target_folder(), prompts_file())
    weak = drafter_artifacts(target_folder(), prompts_file(), replace(TINY, name="weak", steps=100))
    drafters = {"dflash": made.drafter, "weak": weak.drafter, "eagle3": trained_eagle3(made)}
    return {"target": made.target, "prompts": made.prompts, "trajectories": made.heldout}, drafters


def tokens_per_s(
    test: EmbeddedSpeedTest, decoder: Decoder, prompts: Sequence[Prompt], slots: int
) -> tuple[float, float]:
    """Return tokens/s with all slots full, and the tokens that a verify step committed (NaN without a drafter)."""
    most = test.config.sampling.max_new_tokens
    engine = test.engine(test.target, decoder, slots, max(len(p.token_ids) for p in prompts) + most)
    count = max(FEWEST_ANSWERS, ANSWERS_PER_SLOT * slots) + slots
    requests = (
        Request(str(n), p.token_ids, most) for n, p in zip(range(count), itertools.cycle(prompts), strict=False)
    )
    ends, tokens, steps = [time.perf_counter()], [0], [0]
    for done in engine.generate(requests):
        ends.append(time.perf_counter())
        tokens.append(len(done.response_ids))
        steps.append(done.verify_steps)
    first, last = (0, count) if slots == 1 else (slots, count - slots)
    tau = (sum(tokens) - count) / sum(steps) if decoder.drafter else float("nan")
    return sum(tokens[first + 1 : last + 1]) / (ends[last] - ends[first]), tau


def measure(
    test: EmbeddedSpeedTest, decoders: Mapping[Cell, Decoder], prompts: Sequence[Prompt], slots: int, rounds: int
) -> tuple[dict[Cell, float], dict[Cell, float]]:
    """Return the speed-up of each cell, over rounds in alternating order, and the tokens that its steps committed."""
    speeds: dict[Cell, list[float]] = {cell: [] for cell in decoders}
    taus = {}
    for index in range(rounds):
        for cell in list(decoders)[:: -1 if index % 2 else 1]:
            speed, taus[cell] = tokens_per_s(test, decoders[cell], prompts, slots)
            speeds[cell].append(speed)
    logs = {cell: float(np.mean(np.log(found))) for cell, found in speeds.items()}
    return {cell: float(np.exp(value - logs[PLAIN, 1])) for cell, value in logs.items()}, taus


def row(point: LoadPoint, speedups: Mapping[Cell, float]) -> dict[str, Any]:
    """Return the prediction of one arm at one number in flight beside what was measured."""
    low, high = np.exp(estimate_of(point).interval() or (np.nan, np.nan))
    own = {width: speed for (arm, width), speed in speedups.items() if arm == point.arm}
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
    options = harness.parser(__doc__, repetitions=2)
    harness.add_clock(options)
    chosen = options.parse_args()
    harness.set_process(chosen)
    harness.set_clock(chosen.cpu_time)
    inputs, folders = drafter_folders()
    config = EvaluationConfig.model_validate(
        {"sampling": {"max_new_tokens": TINY.max_new_tokens}, "rounds": 2, "exactness_prompts": 0}
    )
    with tempfile.TemporaryDirectory() as folder:
        arms = {f"{PREFIX}{arm}": path for arm, path in folders.items()}
        ctx = RecordingContext.under(Path(folder), {**inputs, **arms})
        load.SHARE = float("inf")  # all numbers in flight
        STAGE.run(ctx, config)
        predicted = EvaluationResult.read(ctx.out)
        target = Target.load(inputs["target"])
        drafters = {arm: load_drafter(path / DRAFTER_FOLDER, target) for arm, path in folders.items()}
        answers = load_trajectories(inputs["trajectories"], ["heldout"]).trajectories
        tallies = Replayer(target).acceptance(drafters, answers)
        decoders: dict[Cell, Decoder] = {(PLAIN, 1): Decoder()}
        for arm, drafter in drafters.items():
            decoders |= {(arm, width): Decoder(drafter, width) for width in widths_of(drafter.block_size)}
        test = EmbeddedSpeedTest(ctx, target, config, 0)
        prompts = load_prompts(inputs["prompts"], ["heldout"])
        rows: list[dict[str, Any]] = []
        taus: dict[Cell, float] = {}
        for slots in IN_FLIGHT:
            speedups, taus = measure(test, decoders, prompts, slots, chosen.repetitions)
            points = [p for p in predicted.load if (p.concurrency, p.other) == (slots, PLAIN)]
            found = [row(point, speedups) for point in points]
            if found:  # fewer numbers are predicted where steps take long
                title = f"speed-up over no drafter, {slots} in flight"
                harness.print_rows(title, found)
            rows += found
    by_width = []
    for (arm, width), tau in list(taus.items())[1:]:
        committed, steps = tallies[arm].at_width(width)
        by_width.append([arm, width, float(committed.sum() / steps.sum()), tau])
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
