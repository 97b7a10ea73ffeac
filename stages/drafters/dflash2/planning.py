"""What a training of a DFlash2 keeps for its backward: a DFlash's, and its convolutions'."""

from __future__ import annotations

from draftsmith.stages.drafters.architecture import Architecture
from draftsmith.stages.drafters.dflash import planning as dflash
from draftsmith.stages.drafters.dflash2.traits import TRAITS
from draftsmith.stages.targets.estimate import ModelSize

__all__ = ["TRAITS", "architecture", "kept_by_block", "kept_by_context_token", "kept_by_own_logits"]

CONVOLUTION = 16  # bytes a channel and side of a sublayer: its input, what is shifted, and its kernels (two taps)
kept_by_context_token, kept_by_own_logits = dflash.kept_by_context_token, dflash.kept_by_own_logits


def architecture() -> Architecture:
    from draftsmith.stages.drafters.dflash2 import checkpoint

    return checkpoint


def kept_by_block(size: ModelSize, block_size: int, compute_bytes: int) -> float:
    """With a convolution at both sides of each of the two sublayers."""
    return dflash.kept_by_block(size, block_size, compute_bytes, around=4 * CONVOLUTION * size.hidden)
