"""The test bed's drafter: the real stages target, prompts, rollout and sft on the tiny target, in under a minute."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from draftsmith.artifacts.tables.parquet import read_table, write_table
from draftsmith.artifacts.tables.schemas import PROMPTS, TIMINGS, TRAJECTORIES
from tests.testbed import cache, target, ties
from tests.testbed.context import RecordingContext


@dataclass(frozen=True)
class DrafterRecipe:
    """Shape and training of a drafter. The default is the test fixture."""

    name: str = "tiny"
    layers: int = 1
    block_size: int = 8
    target_layer_ids: tuple[int, ...] = (0, 1, 2)  # the default for a target of four layers would repeat one
    answers: int = 320  # trajectories that it is trained on
    validation: int = 8
    heldout: int = 60
    spare: int = 16  # more of either held-out split, of which those with a near-tie are left out
    max_new_tokens: int = 128
    steps: int = 500
    sequences_per_step: int = 8
    anchors_per_sequence: int = 12
    learning_rate: float = 3e-3
    gamma: float = 4.0
    seed: int = 0


TINY = DrafterRecipe()


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


def _run_stage(stage: str, config: dict[str, object], out: Path, seed: int, inputs: dict[str, Path]) -> None:
    """Run a stage's body in this process, with its artifact in `out`."""
    import importlib
    import shutil

    from draftsmith.stages.catalog import STAGES

    declared = importlib.import_module(STAGES[stage]).STAGE
    work = out.with_name(f"{out.name}.work")
    declared.run(RecordingContext(out, work, inputs, seed), declared.config.model_validate(config))
    shutil.rmtree(work)


def build_drafter(folder: Path, target_model: Path, prompts: Path, recipe: DrafterRecipe = TINY) -> None:
    """Run the stages in order, each into its folder of `DrafterArtifacts`."""
    import torch

    made = DrafterArtifacts(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _run_stage("target", {"source": str(target_model), "dtype": "float32"}, made.target, recipe.seed, {})
        counts = {"train": recipe.answers} | {
            split: wanted + recipe.spare for split, wanted in _heldout(recipe).items()
        }
        _run_stage(
            "prompts",
            {"sources": [{"kind": "jsonl", "path": str(prompts)}], "heldout_share": 0.25, "seed": 1, **counts},
            made.prompts,
            recipe.seed,
            {"target": made.target},
        )
        answered = {"target": made.target, "prompts": made.prompts}
        sampling = {"max_new_tokens": recipe.max_new_tokens, "temperature": 0.0}
        for out, splits in ((made.rollout, ["train"]), (made.heldout, ["validation", "heldout"])):
            config: dict[str, object] = {"splits": splits, "sampling": sampling, "engine": {"slots": 32}}
            _run_stage("rollout", config, out, recipe.seed, answered)
        _run_stage(
            "sft",
            {
                "drafter": {
                    "num_layers": recipe.layers,
                    "block_size": recipe.block_size,
                    "target_layer_ids": recipe.target_layer_ids,
                    "mask_token": target.MASK,
                },
                "steps": recipe.steps,
                "learning_rate": recipe.learning_rate,
                "sequences_per_step": recipe.sequences_per_step,
                "anchors_per_sequence": recipe.anchors_per_sequence,
                "gamma": recipe.gamma,
                "compute_dtype": "float32",
            },
            made.drafter,
            recipe.seed,
            {"target": made.target, "trajectories": made.rollout},
        )
        _leave_out_near_ties(made, recipe)
    finally:
        torch.set_num_threads(threads)


def _heldout(recipe: DrafterRecipe) -> dict[str, int]:
    return {"validation": recipe.validation, "heldout": recipe.heldout}


def _leave_out_near_ties(made: DrafterArtifacts, recipe: DrafterRecipe) -> None:
    """Reduce the held-out splits to prompts whose answers have no near-tie of target or drafter."""
    from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
    from draftsmith.stages.drafters.checkpoint import load_drafter
    from draftsmith.stages.target.causal_lm import Target

    target = Target.load(made.target, device="cpu")
    drafter = load_drafter(made.drafter / DRAFTER_FOLDER, target)
    kept: set[str] = set()
    for split, wanted in _heldout(recipe).items():
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
    write_table(
        folder / "prompts.parquet",
        PROMPTS,
        [row for row in rows if row["split"] == "train" or row["prompt_id"] in heldout],
    )
    return folder


def drafter_artifacts(target_model: Path, prompts: Path, recipe: DrafterRecipe = TINY) -> DrafterArtifacts:
    """Return the artifacts, cached.

    Built again when the target, the prompts, the recipe, or the code that shapes or trains a drafter changes; a change
    of engine, store or flow leaves them: what those do to an artifact is for their own tests.
    """
    from draftsmith.artifacts.tables import schemas
    from draftsmith.stages.drafters import checkpoint_format, lm_head
    from draftsmith.stages.drafters.dflash import checkpoint, model
    from draftsmith.stages.target import config, info
    from draftsmith.stages.training import batches, blocks, loop, losses, response_loss, trainer
    from draftsmith.stages.training.sft import trainer as sft_trainer
    from tests.testbed import drafter

    def build(folder: Path) -> None:
        build_drafter(folder, target_model, prompts, recipe)

    shapes = (schemas, lm_head, checkpoint_format, checkpoint, model, drafter, ties)
    trains = (batches, blocks, loop, losses, response_loss, trainer, sft_trainer)
    # both folders are named by a digest of what made them; the path counts because target.json refers to it
    made_from = f"{os.fspath(target_model)} {info.model_digest(target_model, config.weight_files(target_model))}"
    extra = f"{asdict(recipe)} {made_from} {prompts.parent.name}"
    return DrafterArtifacts(cache.cached(f"drafter-{recipe.name}", build, code=(*shapes, *trains), extra=extra))
