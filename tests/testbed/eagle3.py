"""EAGLE-3 drafters for the test bed: one of random weights, and one that the real stage sft has trained a little."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed import cache, random_target
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts

if TYPE_CHECKING:
    from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter
    from draftsmith.stages.target.causal_lm import Target

RANDOM_VOCABULARY = 40  # of 64


def random_eagle3(target: Target, seed: int = 0) -> Eagle3Drafter:
    """Return a drafter of block 5, target layers 2, 0 and 1, 40 draft tokens, with large random weights."""
    import torch

    from draftsmith.stages.drafters.checkpoint import create_drafter
    from draftsmith.stages.drafters.eagle3.config import Eagle3Config
    from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter

    shape = Eagle3Config(
        kind="eagle3",
        block_size=5,
        target_layer_ids=(2, 0, 1),
        draft_vocab_size=RANDOM_VOCABULARY,
        intermediate_size=40,
    )
    generator = torch.Generator().manual_seed(seed + 1)
    frequent = torch.randperm(random_target.VOCAB_SIZE, generator=generator)
    drafter = create_drafter(shape, target, seed, frequent)
    assert isinstance(drafter, Eagle3Drafter)
    with torch.no_grad():
        for parameter in drafter.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.3 * noise if parameter.dim() == 2 else 1 + 0.3 * noise)
    return drafter.eval()


@dataclass(frozen=True)
class Eagle3Recipe:
    """Shape and training of the trained drafter."""

    block_size: int = 5
    target_layer_ids: tuple[int, int, int] = (0, 1, 2)
    draft_vocab_size: int = 120
    steps: int = 120
    sequences_per_step: int = 8
    anchors_per_sequence: int = 12
    learning_rate: float = 3e-3
    seed: int = 0


TINY = Eagle3Recipe()


def trained_eagle3(made: DrafterArtifacts, recipe: Eagle3Recipe = TINY) -> Path:
    """Return the artifact of sft, cached; the checkpoint is in its folder `drafter`.

    Trained again when the target, its answers, the recipe or the code that shapes or trains the drafter changes.
    """
    from draftsmith.artifacts.tables import schemas
    from draftsmith.stages.drafters import checkpoint_format, lm_head
    from draftsmith.stages.drafters.eagle3 import checkpoint, model
    from draftsmith.stages.training import batches, blocks, loop, losses, response_loss, trainer
    from draftsmith.stages.training.sft import stage as sft
    from draftsmith.stages.training.sft import trainer as sft_trainer
    from tests.testbed import eagle3

    def build(folder: Path) -> None:
        import torch

        config = {
            "drafter": {
                "kind": "eagle3",
                "block_size": recipe.block_size,
                "target_layer_ids": recipe.target_layer_ids,
                "draft_vocab_size": recipe.draft_vocab_size,
            },
            "steps": recipe.steps,
            "learning_rate": recipe.learning_rate,
            "sequences_per_step": recipe.sequences_per_step,
            "anchors_per_sequence": recipe.anchors_per_sequence,
            "compute_dtype": "float32",
        }
        inputs = {"target": made.target, "trajectories": made.rollout}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            context = RecordingContext(folder / "drafter", folder / "work", inputs, recipe.seed)
            sft.STAGE.run(context, sft.STAGE.config.model_validate(config))
        finally:
            torch.set_num_threads(threads)

    shapes = (schemas, lm_head, checkpoint_format, checkpoint, model, eagle3, sft)
    trains = (batches, blocks, loop, losses, response_loss, trainer, sft_trainer)
    extra = f"{asdict(recipe)} {made.root}"  # whose name is a digest of target and answers
    return cache.cached("eagle3-tiny", build, code=(*shapes, *trains), extra=extra) / "drafter"
