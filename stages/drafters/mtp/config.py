"""Traits of native heads, and how one drafts. Plans read this module, so it imports no torch."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from draftsmith.stages.drafters.spec import DrafterShape, TrainingRecipe, Traits


class MtpConfig(DrafterShape):
    """The target's own head. Its shape is the target's."""

    kind: Literal["mtp"]
    block_size: Annotated[int, Field(ge=2, description="anchor + chain: the head is used again on its own output")] = 4
    engine: Annotated[
        Literal["sglang", "vllm"], Field(description="engine that serves it: they feed some heads differently")
    ] = "sglang"


TRAITS = Traits(
    kind="mtp",
    shape=MtpConfig,
    checkpoint="draftsmith.stages.drafters.mtp.checkpoint",
    recipe=TrainingRecipe(loss="forward_kl", gamma=-1 / math.log(0.8)),  # as EAGLE-3, whose chains it has
    served_in_any_dtype=True,
    native=True,
)
