"""What a training of a DFlash keeps for its backward; letters as in `stages/drafters/estimate.py`."""

from __future__ import annotations

from draftsmith.stages.drafters.architecture import Architecture
from draftsmith.stages.drafters.dflash.traits import TRAITS
from draftsmith.stages.drafters.estimate import inputs, mlp, widths
from draftsmith.stages.targets.estimate import ModelSize

__all__ = ["TRAITS", "architecture", "kept_by_block", "kept_by_context_token", "kept_by_own_logits"]


def architecture() -> Architecture:
    from draftsmith.stages.drafters.dflash import checkpoint

    return checkpoint


def kept_by_block(size: ModelSize, block_size: int, compute_bytes: int, around: int = 0) -> float:
    """Every token of a block, the anchor's too. around: what a token keeps in a layer beside attention and MLP."""
    H, _, q, k = widths(size)
    a = compute_bytes
    attention = 8 * H + inputs(3, H, a) + (4 + 4 * a) * q + 6 * a * k
    return block_size * (size.layers * (attention + mlp(size, a) + around) + 12 * H)


def kept_by_context_token(size: ModelSize, compute_bytes: int) -> float:
    H, _, _, k = widths(size)
    a = compute_bytes
    return (8 + a) * H + size.layers * (inputs(2, H, a) + (4 + 3 * a) * k)


def kept_by_own_logits(size: ModelSize, positions: int, compute_bytes: int) -> None:
    """Its head is the target's."""
