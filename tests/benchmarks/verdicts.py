"""How often the same evaluation gets the same verdict on its speeds, whatever else the machine does.

The drafters of an evaluation decode its held-out prompts in many rounds, under a load that the command makes. Two
rounds that follow each other are one measurement as the stage takes it; the gate decides on each. With `--twin` a
drafter is compared with itself instead: how often equals are called different, and how often one that is 10 % slower is
detected, where tau and speed are compared and share a level, as in an evaluation of two drafters.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from draftsmith.artifacts.results.evaluation import PLAIN, EvaluationResult, Exactness
from draftsmith.artifacts.store.manifest import read_manifest
from draftsmith.stages.data.held_out import independent_units
from draftsmith.stages.data.stored_prompts import load_prompts
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.evaluation import speed_embedded as embedded
from draftsmith.stages.evaluation.body import speed_comparisons
from draftsmith.stages.evaluation.config import DRAFTERS, EvaluationConfig
from draftsmith.stages.evaluation.gate import GateConfig, decide
from draftsmith.stages.evaluation.looks import open_look
from draftsmith.stages.evaluation.repetitions import machine_errors, steady
from draftsmith.stages.evaluation.speed_embedded import Decoder, EmbeddedSpeedTest, choose_block_sizes
from draftsmith.stages.evaluation.speed_table import log_ratios
from draftsmith.stages.evaluation.speed_warnings import speed_warnings
from draftsmith.stages.evaluation.timed_runs import Row, SpeedMeasurement, one_thread, settings_of
from draftsmith.stages.evaluation.verdicts import verdicts
from draftsmith.stages.runtime.statistics import Estimate
from draftsmith.stages.targets.causal_lm import Target
from tests.testbed.context import RecordingContext

Rows = Sequence[Row]
SLOWER = 1.1
# a loop that never rests, and one that rests for as long as it works, 1 to 5 seconds at a time
LOADS = {
    "idle": "",
    "busy": "while True: pass",
    "waves": "import random, time\nwhile True:\n end = time.monotonic() + random.uniform(1, 5)\n"
    " while time.monotonic() < end: pass\n time.sleep(random.uniform(1, 5))",
}


@contextmanager
def beside(load: str) -> Iterator[None]:
    """Run one loop a core while the block runs."""
    code = LOADS[load]
    loops = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(psutil.cpu_count() or 1) if code]
    try:
        yield
    finally:
        for loop in loops:
            loop.kill()
            loop.wait()


def measured_rounds(
    inputs: Mapping[str, Path], arms: Mapping[str, Path], config: EvaluationConfig, seed: int, rounds: int
) -> tuple[Rows, Rows]:
    """Return rows of the tables `turns` and `requests` of this many rounds. arms: name -> artifact of the drafter."""
    target = Target.load(inputs["target"])
    drafters = {arm: load_drafter(folder / DRAFTER_FOLDER, target) for arm, folder in arms.items()}
    validation = load_prompts(inputs["prompts"], ["validation"])[: config.validation_prompts]
    prompts = load_prompts(inputs["prompts"], ["heldout"])
    with tempfile.TemporaryDirectory() as folder, one_thread(target):
        ctx = RecordingContext.under(Path(folder), inputs, seed)
        test = EmbeddedSpeedTest(ctx, target, config.model_copy(update={"rounds": rounds}), seed)
        sizes, _ = choose_block_sizes(test, drafters, validation, settings_of(config)[0])
        embedded.steady = lambda *_: True
        decoders = {PLAIN: Decoder()} | {arm: Decoder(drafter, sizes[arm]) for arm, drafter in drafters.items()}
        rows, turns = test.time_arms(decoders, open_look(config, prompts, None), settings_of(config))
    return turns, rows


def measurements(turns: Rows, rows: Rows, config: EvaluationConfig) -> Iterator[tuple[Rows, Rows]]:
    """Yield what the stage would have measured: two rounds, and the next two as well where repetitions disagree."""
    rounds, settings = range(1 + max(row["round"] for row in rows)), settings_of(config)

    def of(chosen: Sequence[int]) -> tuple[Rows, Rows]:
        return [t for t in turns if t["round"] in chosen], [r for r in rows if r["round"] in chosen]

    for first in rounds[:-1:2]:  # the order of the arms is reversed in every second one
        found = of(rounds[first : first + 2])
        yield found if steady(*found, settings) else of(rounds[first : first + 4])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("evaluation", type=Path, help="artifact of an evaluation, in its store")
    parser.add_argument("--load", choices=LOADS, default="idle", help="what else the machine does")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--prompts", type=int, help="held-out prompts; by default those of the evaluation")
    parser.add_argument("--tokens", type=int, help="tokens per answer; by default as in the evaluation")
    parser.add_argument("--twin", metavar="ARM", help="compare this drafter with itself")
    parser.add_argument("--min-speedup", type=float, default=GateConfig().min_speedup)
    options = parser.parse_args()
    manifest = read_manifest(options.evaluation)
    store = options.evaluation.resolve().parents[1]
    inputs = {name: store / entry.stage / entry.key[:16] for name, entry in manifest.inputs.items()}
    config = EvaluationConfig.model_validate(manifest.config)
    sampling = config.sampling.model_copy(update={"max_new_tokens": options.tokens} if options.tokens else {})
    changed = {"sampling": sampling, "speed_prompts": options.prompts or config.speed_prompts}
    config = config.model_copy(update=changed | ({"block_sizes": None} if options.twin else {}))
    arms = {name: inputs[name] for name in DRAFTERS if name in inputs}
    if options.twin:
        arms = {"sft": arms[options.twin], "opd": arms[options.twin]}
    with beside(options.load):
        turns, rows = measured_rounds(inputs, arms, config, manifest.seed, options.rounds)
    asked = list(dict.fromkeys(row["prompt_id"] for row in rows))
    units = dict(zip(asked, independent_units(inputs["prompts"], asked), strict=True))
    count: Counter[str] = Counter()
    speedups, errors = [], []
    for own_turns, own_rows in measurements(turns, rows, config):
        errors.append(max(machine_errors(own_turns, own_rows).values()))
        if options.twin:
            count["measurements"] += 1
            for name, factor in (("equal called different", 1.0), ("10 % apart told apart", SLOWER)):
                slower = [
                    {**row, "latency_seconds": row["latency_seconds"] * (factor if row["arm"] == "opd" else 1)}
                    for row in own_rows
                ]
                _, speed = verdicts(
                    {("opd", "sft"): Estimate(0.0, 0.0, len(asked), len(asked) - 1.0)},
                    log_ratios(own_turns, slower, [("opd", "sft")], units),
                    len(asked),
                )
                count[name] += speed.different is True
            continue
        evaluation = EvaluationResult.read(options.evaluation)
        measured = SpeedMeasurement("embedded", list(own_rows), list(own_turns), {}, 0, Exactness())
        others = [each for each in evaluation.comparisons if each.kind != "speed"]
        compared = speed_comparisons(measured, settings_of(config), list(arms), units)
        warnings = speed_warnings(own_turns, own_rows, settings_of(config))
        measured_now = evaluation.model_copy(update={"comparisons": others + compared, "speed_warnings": warnings})
        decision = decide(measured_now, GateConfig(min_speedup=options.min_speedup))
        count[decision.outcome] += 1
        (rule,) = [rule for rule in decision.rules if rule.name == "speed-up"]
        speedups.append(round(rule.metrics["value"] or 0, 3))
    print(
        json.dumps(
            {
                "load": options.load, "prompts": len(asked), "rounds": options.rounds, **count, "speedups": speedups,
                "largest_machine_error": round(max(errors), 4),
                "plain_tokens_per_s": round(
                    sum(t["tokens"] for t in turns if t["arm"] == PLAIN)
                    / sum(t["wall_seconds"] for t in turns if t["arm"] == PLAIN), 1
                ),
            }
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
