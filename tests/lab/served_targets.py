"""Drafters of a target as it is and as it is quantised, each on all: `python -m tests.lab.served_targets FOLDER`.

The small target of the test bed is computed in bfloat16: as it is, with its linear maps rounded to 8 bits (a scale a
row), and to 4 bits (a scale for 32 weights), as a server quantises weights. Each gives greedy answers to the same
prompts, and drafters are trained on each. All are replayed on the held-out answers of all; on those of a rounded target
also with hidden states of the first one, as by a gate that knows only transformers' target. A finished stage is kept.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from draftsmith.stages.catalog import STAGES
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, StoredTrajectories, load_trajectories
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.engines.servers.identity import own_logprobs
from draftsmith.stages.engines.servers.requirements import SCORED_TEXT
from draftsmith.stages.evaluation.acceptance import acceptance_table
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.replay.steps import AcceptanceStats
from draftsmith.stages.targets.causal_lm import Target
from tests.lab.seasons import copy_target, rounded
from tests.testbed import target
from tests.testbed.context import RecordingContext
from tests.testbed.procedural.training import MASK

ROUNDED = {"int8": (8, None), "4 bits": (4, 32)}  # bits, and weights to a scale
TARGETS = ("bfloat16", *ROUNDED)
COUNTS = {"train": 400, "heldout": 120}
STEPS, SEEDS = 600, (0, 1, 2)
GREEDY = {"max_new_tokens": 96, "temperature": 0.0}
TRAINING = {
    "drafter": {"num_layers": 1, "block_size": 8, "target_layer_ids": (0, 1, 2), "mask_token": MASK},
    "learning_rate": 3e-3,
    "sequences_per_step": 8,
    "anchors_per_sequence": 12,
    "gamma": 4.0,
    "compute_dtype": "float32",
}


def stage(
    name: str, out: Path, config: Mapping[str, Any], inputs: Mapping[str, Path] | None = None, seed: int = 0
) -> Path:
    """Run a stage unless it has been, and return its artifact."""
    if not (done := out.with_suffix(".done")).exists():
        print(out.name, flush=True)
        declared = importlib.import_module(STAGES[name]).STAGE
        declared.run(
            RecordingContext(out, out.with_suffix(".work"), inputs or {}, seed), declared.config.model_validate(config)
        )
        done.touch()
    return out


def artifacts(folder: Path, name: str) -> dict[str, Path]:
    """Return the artifacts of a target, of the prompts, of its answers, and of a drafter for each seed."""
    source = target.target_folder()
    if name in ROUNDED:
        quantised = folder / f"{name}-weights"
        if not quantised.exists():
            copy_target(source, quantised, rounded(load_file(source / "model.safetensors"), *ROUNDED[name]))
        source = quantised
    made = {"target": stage("target", folder / f"{name}-target", {"source": str(source), "dtype": "bfloat16"})}
    prompts = {"sources": [{"kind": "jsonl", "path": str(target.prompts_file())}], "heldout_share": 0.25, **COUNTS}
    made["prompts"] = stage("prompts", folder / f"{name}-prompts", prompts, made)
    for split in COUNTS:
        config = {"splits": [split], "sampling": GREEDY, "engine": {"slots": 32}}
        made[split] = stage("rollout", folder / f"{name}-{split}", config, {n: made[n] for n in ("target", "prompts")})
    inputs = {"target": made["target"], "trajectories": made["train"]}
    for seed in SEEDS:
        out = folder / f"{name}-sft-{seed}"
        made[f"drafter-{seed}"] = stage("sft", out, TRAINING | {"steps": STEPS}, inputs, seed)
    return made


def over_seeds(
    model: Target, made: Mapping[str, Mapping[str, Path]], answers: StoredTrajectories
) -> dict[str, AcceptanceStats]:
    """Return the steps of the drafters of each target on these answers, the seeds' together."""
    drafters = {
        f"{name} {seed}": load_drafter(each[f"drafter-{seed}"] / DRAFTER_FOLDER, model, any_target=True)
        for name, each in made.items()
        for seed in SEEDS
    }
    tallies = Replayer(model, ReplayOptions(with_proposals=False)).acceptance(drafters, answers.trajectories)
    print({name: round(tally.tau, 3) for name, tally in tallies.items()})
    found = {}
    for name in made:
        found[name] = AcceptanceStats(len(answers.trajectories))
        for seed in SEEDS:
            found[name].committed += tallies[f"{name} {seed}"].committed
            found[name].steps += tallies[f"{name} {seed}"].steps
    return found


def main(folder: Path) -> None:
    """Train all drafters, and print tau of each on each target with its 95 % interval over answers."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    made = {name: artifacts(folder, name) for name in TARGETS}
    models = {name: Target.load(each["target"]) for name, each in made.items()}
    heldout = {name: load_trajectories(each["heldout"]) for name, each in made.items()}
    tokens = models["bfloat16"].tokenizer.encode(SCORED_TEXT, add_special_tokens=False)
    scored = {name: own_logprobs(each["target"], tokens, print) for name, each in made.items()}
    for name in ROUNDED:
        apart = [abs(a - b) for a, b in zip(scored["bfloat16"], scored[name], strict=True)]
        ours, theirs = ({tuple(each.tokens) for each in heldout[of].trajectories} for of in ("bfloat16", name))
        print(f"{name}: log-probs are {sum(apart) / len(apart):.2g} nats apart in the mean, {max(apart):.2g} at most;")
        print(f"  {len(ours & theirs)} of {len(ours)} held-out answers are equal")
    print("| answers of | hidden states of |", " | ".join(TARGETS), "|")
    for of, under in (*((name, name) for name in TARGETS), *((name, "bfloat16") for name in ROUNDED)):
        answers = heldout[of]
        tallies = over_seeds(models[under], made, answers)
        table = acceptance_table(tallies, answers.prompts, [False] * len(answers.trajectories))
        cells = [f"{each.tau:.3f} [{each.tau_low:.3f}, {each.tau_high:.3f}]" for each in table.values()]
        for name in ROUNDED:
            more = table[name].differences["bfloat16"]
            cells.append(f"{name}: {more.value:+.3f} [{more.low:+.3f}, {more.high:+.3f}]")
        print("|", " | ".join([of, under, *cells]), "|", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
