"""Calibration of DSpark's confidence on the test bed: its error on held-out answers, as trained and corrected.

A DFlash drafter continues as DSpark, for a few and for many steps, on greedy and on sampled answers. `of chance` is the
mean error of confidences that are exactly right, with as many proposals. `added` is what the logits add to the time of
a replay.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import expit

from draftsmith.stages.data.prompts.stage import STAGE as PROMPTS
from draftsmith.stages.data.prompts.stage import PromptsConfig
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.engines.stage import STAGE as ROLLOUT
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.acceptance import calibration, expected_calibration_error
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.sft.stage import STAGE as SFT
from tests.benchmarks import harness
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts, drafter_artifacts
from tests.testbed.target import prompts_file

SPLITS = {"train": 320, "validation": 60, "heldout": 80}
TRAINING = {"sequences_per_step": 8, "anchors_per_sequence": 12, "compute_dtype": "float32", "learning_rate": 1e-3}


def answers_of(made: DrafterArtifacts, prompts: Path, temperature: float, folder: Path) -> tuple[Path, Path]:
    """Return the answers to train on, and those to measure on."""
    found = {}
    for name, splits in (("train", ["train"]), ("heldout", ["validation", "heldout"])):
        ctx = RecordingContext.under(folder / name, {"target": made.target, "prompts": prompts})
        sampling = {"max_new_tokens": 128, "temperature": temperature}
        config = {"splits": splits, "sampling": sampling, "engine": {"slots": 32}}
        ROLLOUT.run(ctx, RolloutConfig.model_validate(config))
        found[name] = ctx.out
    return found["train"], found["heldout"]


def measure(made: DrafterArtifacts, answers: Path, heldout: Path, steps: int, folder: Path) -> dict[str, Any]:
    """Train a drafter and measure its confidence; return a row of the table."""
    ctx = RecordingContext.under(folder, {"target": made.target, "trajectories": answers})
    start = {"init_from": str(made.drafter / DRAFTER_FOLDER), "drafter": {"kind": "dspark"}}
    SFT.run(ctx, SftConfig.model_validate({**TRAINING, **start, "steps": steps}))
    target = Target.load(made.target, device="cpu")
    drafters = {"it": load_drafter(ctx.out / DRAFTER_FOLDER, target)}
    stored = {split: load_trajectories(heldout, [split]) for split in ("validation", "heldout")}
    sampling = stored["heldout"].sampling
    replayer = Replayer(target, ReplayOptions(sampling=sampling, with_confidence=True))
    tallies = {split: replayer.acceptance(drafters, each.trajectories)["it"] for split, each in stored.items()}
    decisions = tallies["heldout"].decisions
    found = calibration(tallies["validation"].decisions, decisions)
    assert found is not None
    right, rng = expit(found.scale * decisions.logits + found.shift), np.random.default_rng(0)
    chance = [expected_calibration_error(right, rng.random(len(right)) < right) for _ in range(200)]
    without = Replayer(target, ReplayOptions(sampling=sampling))
    texts = stored["heldout"].trajectories
    seconds = harness.alternate(
        {"with": lambda: replayer.acceptance(drafters, texts), "without": lambda: without.acceptance(drafters, texts)},
        3,
    )
    return {
        "answers": "greedy" if sampling.greedy else "sampled",
        "steps": steps,
        "tau": tallies["heldout"].tau,
        "fitted_on": found.fitted_on,
        "proposals": found.decisions,
        "confidence": found.confidence,
        "accepted": found.accepted,
        "error": found.error,
        "calibrated": found.error_calibrated,
        "of chance": float(np.mean(chance)),
        "scale": found.scale,
        "shift": found.shift,
        "added": harness.median(seconds["with"]) / harness.median(seconds["without"]) - 1,
    }


def main() -> None:
    parser = harness.parser(__doc__)
    harness.add_clock(parser)
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 500], help="of training")
    options = harness.parsed(parser)
    made, rows = drafter_artifacts(), []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prompts = RecordingContext.under(folder / "prompts", {"target": made.target})
        source = {"kind": "jsonl", "path": str(prompts_file())}
        PROMPTS.run(
            prompts, PromptsConfig.model_validate({"sources": [source], "heldout_share": 0.25, "seed": 1, **SPLITS})
        )
        for temperature in (0.0, 1.0):
            answers = answers_of(made, prompts.out, temperature, folder / f"answers-{temperature}")
            for steps in options.steps:
                rows.append(measure(made, *answers, steps, folder / f"sft-{temperature}-{steps}"))
                harness.print_rows("confidence", rows)
    harness.report("confidence", {"rows": rows}, options)


if __name__ == "__main__":
    harness.run(main)
