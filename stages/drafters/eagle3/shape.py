"""What a new EAGLE-3 looks like."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from draftsmith.stages.contract import Config


class Eagle3Config(Config):
    """Shape of a new EAGLE-3 drafter. Sizes left out follow the target."""

    kind: Literal["eagle3"]
    block_size: Annotated[
        int, Field(ge=2, description="anchor + chain; training unrolls as many steps as the chain is long")
    ] = 8
    target_layer_ids: Annotated[
        tuple[int, int, int] | None,
        Field(description="layer k = the hidden state AFTER target layer k; left out: SGLang's choice"),
    ] = None
    draft_vocab_size: Annotated[
        int | None,
        Field(ge=2, description="propose only from this many most frequent tokens of the answers; left out: all"),
    ] = None
    intermediate_size: Annotated[int | None, Field(ge=1)] = None
