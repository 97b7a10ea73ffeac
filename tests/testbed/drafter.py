"""The test bed's drafter: the real stages target, prompts, rollout and sft on the tiny target, in under a minute."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from draftsmith.artifacts.tables.parquet import read_table, write_table
from draftsmith.artifacts.tables.schemas import PROMPTS, TIMINGS, TRAJECTORIES
from tests.testbed import cache, target, ties
from tests.testbed.context import RecordingContext

HELDOUT = {"validation": 8, "heldout": 60}  # prompts
SPARE = 16  # more of either held-out split, of which those with a near-tie are left out
ANSWER_TOKENS = 128
TRAINING: dict[str, Any] = {
    "sequences_per_step": 8,
    "anchors_per_sequence": 12,
    "learning_rate": 3e-3,
    "compute_dtype": "float32",
}
SHAPE = {
    "num_layers": 1,
    "block_size": 8,
    "target_layer_ids": (0, 1, 2),  # the default for a target of four layers would repeat one
    "mask_token": target.MASK,
}


@dataclass(frozen=True)
class DrafterArtifacts:
    """Folders of complete artifacts, as the inputs of a stage: `{"target": made.target, "drafter": made.drafter}`.

    The target is served in float32, where replay and decoding are exact.
    """

    root: Path

    @property
    def target(self) -> Path:
        """Return the artifact of the target."""
        return self.root / "target"

    @property
    def prompts(self) -> Path:
        """Return the prompts: splits train, validation, heldout; held-out ones without a near-tie (`ties.py`)."""
        return self.root / "prompts"

    @property
    def rollout(self) -> Path:
        """Return the target's greedy answers to the training prompts."""
        return self.root / "rollout"

    @property
    def heldout(self) -> Path:
        """Return its greedy answers to the validation and held-out prompts, which the drafter was not trained on."""
        return self.root / "heldout"

    @property
    def drafter(self) -> Path:
        """Return the artifact of sft; the checkpoint is in its folder `drafter`."""
        return self.root / "drafter"

    def to_evaluate(self, **drafters: Path) -> dict[str, Path]:
        """Return the inputs of an evaluation of the drafter as `sft`, and of others."""
        inputs = {"target": self.target, "prompts": self.prompts, "trajectories": self.heldout}
        return {**inputs, "sft": self.drafter, **drafters}


def _run_stage(stage: str, out: Path, inputs: Mapping[str, Path], **config: Any) -> None:
    """Run a stage's body in this process, with its artifact in `out`."""
    import importlib
    import shutil

    from draftsmith.stages.catalog import STAGES

    work = out.with_name(f"{out.name}.work")
    RecordingContext(out, work, inputs).run(importlib.import_module(STAGES[stage]).STAGE, **config)
    shutil.rmtree(work)


def build_drafter(folder: Path, target_model: Path, prompts: Path, steps: int) -> None:
    """Run the stages in order, each into its folder of `DrafterArtifacts`."""
    made = DrafterArtifacts(folder)
    _run_stage("target", made.target, {}, source=str(target_model), dtype="float32")
    counts = {"train": 320, **{split: wanted + SPARE for split, wanted in HELDOUT.items()}}
    sources = [{"kind": "jsonl", "path": str(prompts)}]
    inputs = {"target": made.target}
    _run_stage("prompts", made.prompts, inputs, sources=sources, heldout_share=0.25, seed=1, **counts)
    answered = {**inputs, "prompts": made.prompts}
    sampling = {"max_new_tokens": ANSWER_TOKENS, "temperature": 0.0}
    for out, splits in ((made.rollout, ["train"]), (made.heldout, list(HELDOUT))):
        _run_stage("rollout", out, answered, splits=splits, sampling=sampling, engine={"slots": 32})
    trained = {**inputs, "trajectories": made.rollout}
    _run_stage("sft", made.drafter, trained, **TRAINING, drafter=SHAPE, steps=steps, gamma=4.0)
    _leave_out_near_ties(made)


def _leave_out_near_ties(made: DrafterArtifacts) -> None:
    """Reduce the held-out splits to prompts whose answers have no near-tie of target or drafter."""
    from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
    from draftsmith.stages.drafters.checkpoint import load_drafter
    from draftsmith.stages.target.causal_lm import Target

    target = Target.load(made.target, device="cpu")
    drafter = load_drafter(made.drafter / DRAFTER_FOLDER, target)
    kept: set[str] = set()
    for split, wanted in HELDOUT.items():
        clear = [
            trajectory.trajectory_id.split("/")[0]
            for trajectory in load_trajectories(made.heldout, [split]).trajectories
            if ties.target_margin(target, trajectory) > ties.TARGET_TIE
            and ties.draft_margin(target, drafter, trajectory) > ties.DRAFT_TIE
        ]
        assert len(clear) >= wanted, f"{split}: {len(clear)} prompts are left, {wanted} are wanted"
        kept |= set(clear[:wanted])
    keep_prompts(made.prompts, made.prompts, kept)
    for name, schema in (("trajectories", TRAJECTORIES), ("timings", TIMINGS)):
        path = made.heldout / f"{name}.parquet"
        rows = read_table(path, schema).to_pylist()
        write_table(path, schema, [row for row in rows if row["trajectory_id"].split("/")[0] in kept])


def keep_prompts(prompts: Path, folder: Path, heldout: set[str]) -> Path:
    """Write the artifact of `prompts` to `folder` with only these prompts in its held-out splits."""
    rows = read_table(prompts / "prompts.parquet", PROMPTS).to_pylist()
    folder.mkdir(parents=True, exist_ok=True)
    kept = [row for row in rows if row["split"] == "train" or row["prompt_id"] in heldout]
    write_table(folder / "prompts.parquet", PROMPTS, kept)
    return folder


def training_code() -> tuple[ModuleType, ...]:
    """Return the modules that train a drafter of any kind."""
    from draftsmith.artifacts.tables import schemas
    from draftsmith.stages.drafters import checkpoint_format, lm_head
    from draftsmith.stages.training import batches, blocks, loop, losses, response_loss, trainer
    from draftsmith.stages.training.sft import trainer as sft_trainer

    shapes = (schemas, lm_head, checkpoint_format)
    return (*shapes, batches, blocks, loop, losses, response_loss, trainer, sft_trainer)


def drafter_artifacts(target_model: Path, prompts: Path, steps: int = 500) -> DrafterArtifacts:
    """Return the artifacts of a drafter that has learned for so many steps, cached.

    Built again when the target, the prompts, or the code that shapes or trains a drafter changes; a change of engine,
    store or flow leaves them: what those do to an artifact is for their own tests.
    """
    from draftsmith.stages.drafters.dflash import checkpoint, model
    from draftsmith.stages.target import config, info
    from tests.testbed import drafter

    def build(folder: Path) -> None:
        build_drafter(folder, target_model, prompts, steps)

    # both folders are named by a digest of what made them; the path counts because target.json refers to it
    made_from = f"{os.fspath(target_model)} {info.model_digest(target_model, config.weight_files(target_model))}"
    code = (*training_code(), checkpoint, model, drafter, ties)
    return DrafterArtifacts(
        cache.cached(f"drafter-{steps}", build, code=code, extra=f"{made_from} {prompts.parent.name}")
    )
