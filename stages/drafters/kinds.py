"""The architectures by their kind, for whoever plans: without torch. Their models: `checkpoint.py`."""

from __future__ import annotations

from typing import Protocol

from draftsmith.stages.drafters.dflash import planning as dflash
from draftsmith.stages.drafters.dflash2 import planning as dflash2
from draftsmith.stages.drafters.dspark import planning as dspark
from draftsmith.stages.drafters.eagle3 import planning as eagle3
from draftsmith.stages.drafters.traits import Traits
from draftsmith.stages.targets.estimate import ModelSize


class Planning(Protocol):
    """What a module `draftsmith.stages.drafters.<kind>.planning` offers: bytes that a training keeps for its backward.

    size: of the drafter; compute_bytes: of an element in the products.
    """

    TRAITS: Traits

    def kept_by_block(self, size: ModelSize, block_size: int, compute_bytes: int) -> float:
        """Of one block or chain, through all layers."""

    def kept_by_context_token(self, size: ModelSize, compute_bytes: int) -> float:
        """Of one token of a trajectory, without its features."""

    def kept_by_own_logits(self, size: ModelSize, positions: int, compute_bytes: int) -> float | None:
        """Of a chunk of positions, where a head with weights of the drafter's keeps whole rows of logits whatever the
        loss; None behind the target's head, where the loss decides."""


KINDS: dict[str, Planning] = {"dflash": dflash, "dflash2": dflash2, "dspark": dspark, "eagle3": eagle3}
