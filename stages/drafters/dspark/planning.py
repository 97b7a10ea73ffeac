"""What a training of a DSpark keeps for its backward: a DFlash's, and whole rows of logits."""

from __future__ import annotations

from draftsmith.stages.drafters.architecture import Architecture
from draftsmith.stages.drafters.dflash import planning as dflash
from draftsmith.stages.drafters.dspark.traits import TRAITS
from draftsmith.stages.targets.estimate import ModelSize

__all__ = ["TRAITS", "architecture", "kept_by_block", "kept_by_context_token", "kept_by_own_logits"]

LOGIT_COPIES = 9  # of its own loss and of its confidence's, for sampled answers; with top-p 12, greedy 4
kept_by_block, kept_by_context_token = dflash.kept_by_block, dflash.kept_by_context_token


def architecture() -> Architecture:
    from draftsmith.stages.drafters.dspark import checkpoint

    return checkpoint


def kept_by_own_logits(size: ModelSize, positions: int, compute_bytes: int) -> float:  # noqa: ARG001
    """Its bias is added to all of the target's: float32."""
    return float(LOGIT_COPIES * positions * size.vocabulary * 4)
