"""The test bed's drafter: the real stages target, prompts, rollout and sft on the tiny target, in under a minute."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.testbed import cache, target
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
        """`target.json`."""
        return self.root / "target"

    @property
    def prompts(self) -> Path:
        """`prompts.parquet`: splits train, validation, heldout."""
        return self.root / "prompts"

    @property
    def rollout(self) -> Path:
        """`trajectories.parquet`: greedy answers of the target alone to the train prompts."""
        return self.root / "rollout"

    @property
    def heldout(self) -> Path:
        """The same for the splits validation and heldout, which the drafter was not trained on."""
        return self.root / "heldout"

    @property
    def drafter(self) -> Path:
        """The artifact of sft: the checkpoint lies in its folder `drafter`."""
        return self.root / "drafter"


def _run_stage(stage: str, config: dict[str, object], out: Path, seed: int, inputs: dict[str, Path]) -> None:
    """Run a stage's body in this process, its artifact in `out`."""
    import importlib
    import shutil

    declared = importlib.import_module(f"draftsmith.stages.{stage}").STAGE
    work = out.with_name(f"{out.name}.work")
    declared.run(RecordingContext(out, work, inputs, seed), declared.config.model_validate(config))
    shutil.rmtree(work)


def build_drafter(folder: Path, target_model: Path, prompts: Path, recipe: DrafterRecipe = TINY) -> None:
    """Run the stages one after the other, each into its folder of `DrafterArtifacts`."""
    import torch

    made = DrafterArtifacts(folder)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        _run_stage("target", {"source": str(target_model), "dtype": "float32"}, made.target, recipe.seed, {})
        counts = {"train": recipe.answers, "validation": recipe.validation, "heldout": recipe.heldout}
        _run_stage(
            "prompts",
            {"sources": [{"kind": "jsonl", "path": str(prompts)}], **counts},
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
    finally:
        torch.set_num_threads(threads)


def drafter_artifacts(target_model: Path, prompts: Path, recipe: DrafterRecipe = TINY) -> DrafterArtifacts:
    """The artifacts, from the cache or built now.

    Built again when the target, the prompts, the recipe, or the code that shapes or trains a drafter changes; a change
    of engine, store or flow leaves them: what those do to an artifact is for their own tests.
    """
    from draftsmith.artifacts import schemas
    from draftsmith.stages.drafters import head, layout
    from draftsmith.stages.drafters.dflash import checkpoint, model
    from draftsmith.stages.targets import resolve, source
    from draftsmith.stages.training import (
        anchors,
        batches,
        blocks,
        chunked,
        loop,
        losses,
        response,
        supervised,
        vocabulary,
    )
    from tests.testbed import drafter

    def build(folder: Path) -> None:
        build_drafter(folder, target_model, prompts, recipe)

    shapes = (schemas, head, layout, checkpoint, model, drafter)
    trains = (anchors, batches, blocks, chunked, loop, losses, response, supervised, vocabulary)
    # both folders are named by a digest of what made them; the path counts because target.json refers to it
    made_from = f"{os.fspath(target_model)} {resolve.model_digest(target_model, source.weight_files(target_model))}"
    extra = f"{asdict(recipe)} {made_from} {prompts.parent.name}"
    return DrafterArtifacts(cache.cached(f"drafter-{recipe.name}", build, code=(*shapes, *trains), extra=extra))
