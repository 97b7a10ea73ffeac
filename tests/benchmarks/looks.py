"""How often a refresh promotes a drafter of a known speed-up: measured rows, resampled and rescaled to it.

Every held-out prompt of an evaluation is decoded by all arms. A draw takes prompts of each set at random, in the sets'
shares, and the challenger's seconds are rescaled so that its speed-up over all measured prompts is exactly the wanted
one. The gate's rule then takes its looks. `--rows FILE` keeps the measured rows, or reads them where they are there.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from draftsmith.artifacts.results.evaluation import PLAIN, EvaluationResult, Look
from draftsmith.artifacts.store.manifest import read_manifest
from draftsmith.stages.data.held_out import independent_units
from draftsmith.stages.data.stored_prompts import load_prompts
from draftsmith.stages.evaluation.config import DRAFTERS, EvaluationConfig
from draftsmith.stages.evaluation.looks import MOST_LOOKS, decides, level_of
from draftsmith.stages.evaluation.speed_table import log_ratios
from draftsmith.stages.evaluation.timed_runs import Row
from draftsmith.stages.runtime.statistics import Unit
from tests.benchmarks.verdicts import LOADS, beside, measured_rounds


def rescaled(rows: list[Row], arm: str, speedup: float, units: dict[str, Unit]) -> list[Row]:
    """Return the rows of `arm` and of decoding without a drafter, the former as fast as the speed-up says.

    The speed-up is that of equal shares of the sets, as they are drawn.
    """
    sizes = Counter(unit.stratum for unit in units.values())
    seconds: dict[str, float] = defaultdict(float)
    tokens: dict[str, float] = defaultdict(float)
    for row in rows:
        weight = 1 / sizes[units[row["prompt_id"]].stratum]
        seconds[row["arm"]] += weight * row["latency_seconds"]
        tokens[row["arm"]] += weight * row["tokens"]
    measured = tokens[arm] / seconds[arm] / (tokens[PLAIN] / seconds[PLAIN])
    factor = {arm: measured / speedup, PLAIN: 1.0}
    return [r | {"latency_seconds": r["latency_seconds"] * factor[r["arm"]]} for r in rows if r["arm"] in factor]


def looks_of(
    rows: list[Row], arm: str, units: dict[str, Unit], size: int, rng: np.random.Generator
) -> list[tuple[bool | None, float]]:
    """Return of each look whether it decides, and how far its bound lies from the value, as a share of it."""
    by_set: dict[str, list[str]] = {}
    for prompt, unit in units.items():
        by_set.setdefault(unit.stratum, []).append(prompt)
    order = list(by_set)
    by_prompt: dict[str, list[Row]] = {}
    for row in rows:
        by_prompt.setdefault(row["prompt_id"], []).append(row)
    drawn: list[Row] = []
    of_draw: dict[str, Unit] = {}
    found = []
    for number in range(1, MOST_LOOKS + 1):
        for index in range(size):
            name = order[index % len(order)]
            own, prompt = f"{number}/{index}", str(rng.choice(by_set[name]))
            of_draw[own] = Unit(name, own)
            drawn += [row | {"prompt_id": own} for row in by_prompt[prompt]]
        runs = [
            {"arm": a, "round": 0, "tokens": 1, "wall_seconds": 1.0, "concurrency": 1, "batches": 2}
            for a in (arm, PLAIN)
        ]
        estimate = log_ratios(runs, drawn, [(arm, PLAIN)], of_draw)[arm, PLAIN]
        level = level_of(Look(number=number, of=MOST_LOOKS))
        found.append((decides(estimate, 0.0, level), math.exp(estimate.upper(level) - estimate.value) - 1))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("evaluation", type=Path, help="artifact of an evaluation, in its store")
    parser.add_argument("--load", choices=LOADS, default="idle", help="what else the machine does")
    parser.add_argument("--draws", type=int, default=1000)
    parser.add_argument("--tokens", type=int, help="of an answer; by default those of the evaluation")
    parser.add_argument("--prompts", type=int, nargs="+", help="of a look; by default those of the evaluation")
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.0, 1.2])
    parser.add_argument("--rows", type=Path)
    options = parser.parse_args()
    manifest = read_manifest(options.evaluation)
    store = options.evaluation.resolve().parents[1]
    inputs = {name: store / entry.stage / entry.key[:16] for name, entry in manifest.inputs.items()}
    config = EvaluationConfig.model_validate(manifest.config)
    arm = EvaluationResult.read(options.evaluation).challenger
    if options.rows is not None and options.rows.exists():
        rows = json.loads(options.rows.read_text())
    else:
        sampling = config.sampling.model_copy(update={"max_new_tokens": options.tokens} if options.tokens else {})
        everything = {"sampling": sampling, "speed_prompts": len(load_prompts(inputs["prompts"], ["heldout"]))}
        arms = {name: inputs[name] for name in DRAFTERS if name in inputs}
        with beside(options.load):
            _, rows = measured_rounds(inputs, arms, config.model_copy(update=everything), manifest.seed, 1)
        rows = [
            {name: row[name] for name in ("arm", "prompt_id", "round", "tokens", "latency_seconds")} for row in rows
        ]
        if options.rows is not None:
            options.rows.write_text(json.dumps(rows))
    asked = list(dict.fromkeys(row["prompt_id"] for row in rows))
    units = dict(zip(asked, independent_units(inputs["prompts"], asked), strict=True))
    plain = [row for row in rows if row["arm"] == PLAIN]
    speed = sum(row["tokens"] for row in plain) / sum(row["latency_seconds"] for row in plain)
    print(json.dumps({"prompts": len(asked), "load": options.load, "plain_tokens_per_s": round(speed, 1)}))
    for size in options.prompts or [config.speed_prompts]:
        for speedup in options.speedups:
            at_speedup, count, widths = rescaled(rows, arm, speedup, units), Counter[str](), []
            for draw in range(options.draws):
                found = looks_of(at_speedup, arm, units, size, np.random.default_rng(draw))
                widths.append(found[0][1])
                decided = next((better for better, _ in found if better is not None), None)
                count["promoted at the first look"] += found[0][0] is True
                count["promoted"] += decided is True
                count["refused"] += decided is False
            bound = {"median_bound": f"{np.median(widths):.1%}", "bound_p90": f"{np.quantile(widths, 0.9):.1%}"}
            print(json.dumps({"prompts_a_look": size, "speedup": speedup, "draws": options.draws, **bound, **count}))


if __name__ == "__main__":
    main()
