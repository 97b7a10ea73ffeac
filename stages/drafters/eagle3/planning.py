"""What a training of an EAGLE-3 keeps for its backward; letters as in `stages/drafters/estimate.py`."""

from __future__ import annotations

from draftsmith.stages.drafters.architecture import Architecture
from draftsmith.stages.drafters.eagle3.traits import TRAITS
from draftsmith.stages.drafters.estimate import LOGIT_COPIES, inputs, mlp, widths
from draftsmith.stages.targets.estimate import ModelSize

__all__ = ["TRAITS", "architecture", "kept_by_block", "kept_by_context_token", "kept_by_own_logits"]


def architecture() -> Architecture:
    from draftsmith.stages.drafters.eagle3 import checkpoint

    return checkpoint


def kept_by_block(size: ModelSize, block_size: int, compute_bytes: int) -> float:
    """Every step of a chain, which has one for each proposal."""
    H, _, q, k = widths(size)
    a = compute_bytes
    both = 2 * 8 * H + inputs(3, 2 * H, a)  # embedding and feature, each with its norm
    own = (block_size / 2 + 1) * 2 * a * k  # of each step the keys and values of all steps before it
    states = 8 * H + 4 * H  # the last norm, and the states of all steps together
    return (block_size - 1) * (both + 3 * a * q + own + mlp(size, a) + states)


def kept_by_context_token(size: ModelSize, compute_bytes: int) -> float:
    H, _, _, k = widths(size)
    a = compute_bytes
    return a * H + 2 * 8 * H + inputs(2, 2 * H, a) + 2 * a * k


def kept_by_own_logits(size: ModelSize, positions: int, compute_bytes: int) -> float:
    """Of its own head, with the gradient that a chunk has of it."""
    return float(LOGIT_COPIES * positions * size.vocabulary * 4 + (compute_bytes + 4) * size.vocabulary * size.hidden)
