"""How a drafter is used when it drafts. What a new one looks like: `<kind>/shape.py`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from draftsmith.stages.contract import Config

NO_FREQUENT_TOKENS = "says nothing of which tokens are frequent, so it drafts from all"  # what head_tokens then does


class DraftingConfig(Config):
    """How a drafter drafts. Part of every trace: other settings propose other tokens."""

    block_size: Annotated[int | None, Field(ge=2, description="left out: the trained block size")] = None
    head_tokens: Annotated[
        int | None,
        Field(ge=2, description="propose only from this many most frequent tokens; embedded engine only"),
    ] = None
