"""EAGLE-3 drafters for the test bed: one of random weights, and one that is shipped, trained a little."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from tests.testbed import random_target, target

if TYPE_CHECKING:
    from draftsmith.stages.drafters.eagle3.model import Eagle3Drafter
    from draftsmith.stages.targets.causal_lm import Target

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


def trained_eagle3() -> Path:
    """Return the artifact of sft; the checkpoint is in its folder `drafter`."""
    return target.shipped() / "eagle3"
