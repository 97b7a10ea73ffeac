"""How a drafter is used when it drafts. What a new one looks like: `<kind>/shape.py`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from draftsmith.stages.contract import Config, OnlyIfSet

Confidence = Annotated[
    float | None,
    Field(
        gt=0,
        lt=1,
        description="cut a block in front of the first proposal that is kept with a smaller probability, by the "
        "drafter's own confidence; of a DSpark with a confidence head, embedded engine only; left out: verify all",
    ),
    OnlyIfSet(),
]


NO_FREQUENT_TOKENS = "says nothing of which tokens are frequent, so it drafts from all"  # what head_tokens then does


class DraftingConfig(Config):
    """How a drafter drafts. Part of every trace: other settings propose other tokens."""

    block_size: Annotated[int | None, Field(ge=2, description="left out: the trained block size")] = None
    head_tokens: Annotated[
        int | None,
        Field(ge=2, description="propose only from this many most frequent tokens; embedded engine only"),
    ] = None
    confidence: Confidence = None


def no_confidence(kind: str, field: str = "drafting.confidence") -> str:
    """What is wrong with a block that is cut by such a drafter. kind: the drafter's."""
    return (
        f"{field}: this {kind} has no confidence head: leave it out, or draft with a dspark that has one "
        "(drafter.confidence_head)"
    )
