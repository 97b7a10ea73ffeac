"""Trains what the test bed ships, in a minute: `python -m tests.testbed.make [--seed N] [--into FOLDER]`.

Float32 training amplifies the last digit of a matrix product, so that the same seed gives other weights on another
processor. So tests judge the files here, not what a machine would train. `DRAFTSMITH_TESTBED=FOLDER` makes them judge
files of another seed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from draftsmith.artifacts.tables.parquet import read_table, write_table
from draftsmith.artifacts.tables.schemas import TIMINGS, TRAJECTORIES
from draftsmith.stages.data.prompts.stage import STAGE as PROMPTS
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.engines.stage import STAGE as ROLLOUT
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.runtime.stage import Stage
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.sft.stage import STAGE as SFT
from tests.testbed import native, target, ties
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts, keep_prompts, write_target
from tests.testbed.procedural.training import MASK, train_target

HELDOUT = {"validation": 8, "heldout": 60}  # prompts
SPARE = 16  # more of either held-out split, without those that have a near-tie
TAU = {"dflash": (5.0, 7.5), "eagle3": (2.5, 4.5)}  # on held-out answers: tests may rely on it
ANSWER_TOKENS = 128
DFLASH_STEPS, EAGLE3_STEPS = 500, 120
DFLASH = {
    "num_layers": 1,
    "block_size": 8,
    "target_layer_ids": (0, 1, 2),  # the default for a target of four layers would repeat one
    "mask_token": MASK,
}
EAGLE3 = {"kind": "eagle3", "block_size": 5, "target_layer_ids": (0, 1, 2), "draft_vocab_size": 120}
TRAINING: dict[str, Any] = {
    "sequences_per_step": 8,
    "anchors_per_sequence": 12,
    "learning_rate": 3e-3,
    "compute_dtype": "float32",
}


def make(folder: Path, seed: int) -> None:
    """Write all files and their checksums. seed: of weights, and of the order in which they are trained."""
    torch.set_num_threads(1)
    first, revised = folder / target.NAME, folder / target.REVISION_NAME
    train_target(first, target.TAUGHT.model_copy(update={"seed": seed}), target.SHAPE)
    _round(first)
    train_target(revised, target.REVISED.model_copy(update={"seed": seed + 1}), target.SHAPE, parent=first)
    _round(revised)
    rows = [
        json.dumps({"messages": [{"role": "user", "content": example.prompt}], "family": example.family}) + "\n"
        for example in target.fresh_prompts(600)
    ]
    (folder / target.PROMPTS_NAME).write_text("".join(rows), encoding="utf-8")

    made = DrafterArtifacts(folder / target.ARTIFACTS)
    write_target(made, first)
    inputs = {"target": made.target}
    counts = {"train": 320, **{split: wanted + SPARE for split, wanted in HELDOUT.items()}}
    sources = [{"kind": "jsonl", "path": str(folder / target.PROMPTS_NAME)}]
    _run(PROMPTS, made.prompts, inputs, sources=sources, heldout_share=0.25, seed=1, **counts)
    sampling = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0.0}
    for out, splits in ((made.rollout, ["train"]), (made.heldout, list(HELDOUT))):
        asked = {**inputs, "prompts": made.prompts}
        _run(ROLLOUT, out, asked, splits=splits, sampling=sampling, engine={"slots": 32})
    train_dflash(made, made.drafter, DFLASH_STEPS, seed)
    answered = {**inputs, "trajectories": made.rollout}
    _run(SFT, folder / "eagle3", answered, seed, **TRAINING, drafter=EAGLE3, steps=EAGLE3_STEPS)
    _keep_clear_answers(made)
    _check_tau(made, {"dflash": made.drafter, "eagle3": folder / "eagle3"})
    with tempfile.TemporaryDirectory() as work:
        native.train_head(made, first, folder / native.HEAD_NAME, Path(work), seed)
    shutil.rmtree(made.target)  # names a folder of this machine
    for info in folder.rglob("drafter.json"):
        info.write_text(info.read_text().replace(f"{folder}/", ""))
    (folder / target.SUMS).write_text(checksums(folder))


def train_dflash(made: DrafterArtifacts, out: Path, steps: int, seed: int = 0) -> None:
    """Train a drafter on the answers of the test bed. out: the artifact."""
    inputs = {"target": made.target, "trajectories": made.rollout}
    _run(SFT, out, inputs, seed, **TRAINING, drafter=DFLASH, steps=steps, gamma=4.0)


def checksums(folder: Path) -> str:
    """Return lines of sha256 and path, for all files but the one that keeps them; `sha256sum --check` reads them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != target.SUMS)
    return "".join(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n" for path in paths)


def _round(model: Path) -> None:
    """Store the weights of a model in bfloat16, half the size: the config still says float32, as it is loaded."""
    file = model / "model.safetensors"
    weights = {name: weight.to(torch.bfloat16) for name, weight in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def _run(stage: Stage, out: Path, inputs: dict[str, Path], seed: int = 0, /, **config: Any) -> None:
    with tempfile.TemporaryDirectory() as work:
        RecordingContext(out, Path(work), inputs, seed).run(stage, **config)


def _keep_clear_answers(made: DrafterArtifacts) -> None:
    """Reduce the held-out splits to prompts whose answers have no near-tie of target or drafter."""
    model = Target.load(made.target, device="cpu")
    drafter = load_drafter(made.drafter / DRAFTER_FOLDER, model)
    kept: set[str] = set()
    for split, wanted in HELDOUT.items():
        clear = [
            trajectory
            for trajectory in load_trajectories(made.heldout, [split]).trajectories
            if ties.target_margin(model, trajectory) > ties.TARGET_TIE
            and ties.draft_margin(model, drafter, trajectory) > ties.DRAFT_TIE
        ]
        if len(clear) < wanted:
            raise SystemExit(
                f"{split}: {len(clear)} answers without a near-tie, {wanted} are wanted. Use another seed."
            )
        kept |= {trajectory.trajectory_id.split("/")[0] for trajectory in clear[:wanted]}
    keep_prompts(made.prompts, made.prompts, kept)
    for name, schema in (("trajectories", TRAJECTORIES), ("timings", TIMINGS)):
        path = made.heldout / f"{name}.parquet"
        rows = read_table(path, schema).to_pylist()
        write_table(path, schema, [row for row in rows if row["trajectory_id"].split("/")[0] in kept])


def _check_tau(made: DrafterArtifacts, artifacts: dict[str, Path]) -> None:
    model = Target.load(made.target, device="cpu")
    drafters = {name: load_drafter(artifact / DRAFTER_FOLDER, model) for name, artifact in artifacts.items()}
    answers = load_trajectories(made.heldout, ["heldout"]).trajectories
    for name, traces in Replayer(model).traces(drafters, answers).items():
        tau = sum(trace.committed.sum() for trace in traces) / sum(len(trace.anchors) for trace in traces)
        print(f"{name}: tau {tau:.2f}")
        low, high = TAU[name]
        if not low < tau < high:
            raise SystemExit(f"{name}: tau {tau:.2f}, tests rely on {low} to {high}. Use another seed.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of weights and of the order of training")
    parser.add_argument("--into", type=Path, default=target.SHIPPED, help="folder; by default that of the repository")
    options = parser.parse_args(arguments)
    into = options.into.resolve()
    if into.exists():
        if not (into / target.SUMS).exists() and any(into.iterdir()):
            raise SystemExit(f"{into}: has other files. Give --into a new folder.")
        shutil.rmtree(into)
    into.mkdir(parents=True)
    make(into, options.seed)


if __name__ == "__main__":
    main()
