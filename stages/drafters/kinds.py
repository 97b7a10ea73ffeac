"""The architectures by their kind: the one place where they are listed. Without torch, for whoever plans.

What works on their models, by the same kinds: `checkpoint.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Protocol

from pydantic import Discriminator, Tag

from draftsmith.stages.drafters.architecture import Architecture
from draftsmith.stages.drafters.dflash import planning as dflash
from draftsmith.stages.drafters.dflash.shape import DFlashConfig
from draftsmith.stages.drafters.dflash2 import planning as dflash2
from draftsmith.stages.drafters.dflash2.shape import DFlash2Config
from draftsmith.stages.drafters.dspark import planning as dspark
from draftsmith.stages.drafters.dspark.shape import DSparkConfig
from draftsmith.stages.drafters.eagle3 import planning as eagle3
from draftsmith.stages.drafters.eagle3.shape import Eagle3Config
from draftsmith.stages.drafters.traits import Traits
from draftsmith.stages.targets.estimate import ModelSize


class Planning(Protocol):
    """What a module `draftsmith.stages.drafters.<kind>.planning` offers. Bytes are those that a training keeps for its
    backward.

    size: of the drafter; compute_bytes: of an element in the products.
    """

    TRAITS: Traits

    def architecture(self) -> Architecture:
        """Its module `checkpoint`, which is imported with torch."""

    def kept_by_block(self, size: ModelSize, block_size: int, compute_bytes: int) -> float:
        """Of one block or chain, through all layers."""

    def kept_by_context_token(self, size: ModelSize, compute_bytes: int) -> float:
        """Of one token of a trajectory, without its features."""

    def kept_by_own_logits(self, size: ModelSize, positions: int, compute_bytes: int) -> float | None:
        """Of a chunk of positions, where a head with weights of the drafter's keeps whole rows of logits whatever the
        loss; None behind the target's head, where the loss decides."""


KINDS: dict[str, Planning] = {"dflash": dflash, "dflash2": dflash2, "dspark": dspark, "eagle3": eagle3}


def _kind_of(value: Any) -> str:
    kind = value.get("kind", "dflash") if isinstance(value, dict) else getattr(value, "kind", "")
    return str(kind)


# What a new drafter looks like; `drafter` in a config.
DrafterConfig = Annotated[
    Annotated[DFlashConfig, Tag("dflash")]
    | Annotated[DFlash2Config, Tag("dflash2")]
    | Annotated[DSparkConfig, Tag("dspark")]
    | Annotated[Eagle3Config, Tag("eagle3")],
    Discriminator(
        _kind_of,
        custom_error_type="drafter_kind",
        custom_error_message=f"kind must be {' or '.join(', '.join(KINDS).rsplit(', ', 1))}",
    ),
]
