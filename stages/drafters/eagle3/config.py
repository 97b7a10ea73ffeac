"""Traits of EAGLE-3, and the shape of a new drafter."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from draftsmith.stages.drafters.spec import DrafterShape, TrainingRecipe, Traits


class Eagle3Config(DrafterShape):
    """Shape of a new EAGLE-3 drafter. By default sizes follow the target."""

    kind: Literal["eagle3"]
    block_size: Annotated[
        int, Field(ge=2, description="anchor + chain; training unrolls one step per token of the chain")
    ] = 8
    target_layer_ids: Annotated[
        tuple[int, int, int] | None,
        Field(description="layer k = the hidden state AFTER target layer k; default: SGLang's choice"),
    ] = None
    draft_vocab_size: Annotated[
        int | None,
        Field(ge=2, description="propose only from the most frequent tokens of the answers, this many; default: all"),
    ] = None


TRAITS = Traits(
    kind="eagle3",
    shape=Eagle3Config,
    checkpoint="draftsmith.stages.drafters.eagle3.checkpoint",
    recipe=TrainingRecipe(loss="forward_kl", gamma=-1 / math.log(0.8)),  # 0.8 per step
    served_in_any_dtype=True,
)
