"""EAGLE-3 drafters for the test bed: one of random weights, and one that the real stage sft has trained a little."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed import cache, random_target
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import TRAINING, DrafterArtifacts, training_code

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


def trained_eagle3(made: DrafterArtifacts) -> Path:
    """Return the artifact of sft, cached; the checkpoint is in its folder `drafter`.

    Trained again when the target, its answers or the code that shapes or trains the drafter changes.
    """
    from draftsmith.stages.drafters.eagle3 import checkpoint, model
    from draftsmith.stages.training.sft import stage as sft
    from tests.testbed import eagle3

    def build(folder: Path) -> None:
        shape = {"kind": "eagle3", "block_size": 5, "target_layer_ids": (0, 1, 2), "draft_vocab_size": 120}
        inputs = {"target": made.target, "trajectories": made.rollout}
        RecordingContext(folder / "drafter", folder / "work", inputs).run(
            sft.STAGE, **TRAINING, drafter=shape, steps=120
        )

    # the folder of the artifacts is named by a digest of target and answers
    code = (*training_code(), checkpoint, model, eagle3, sft)
    return cache.cached("eagle3-tiny", build, code=code, extra=str(made.root)) / "drafter"
