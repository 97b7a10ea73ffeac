"""Traits of DSpark, and the shape of a new drafter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.spec import TrainingRecipe, Traits


class DSparkConfig(DFlashConfig):
    """Shape of a new DSpark drafter, or of the additions to a DFlash drafter that training starts from."""

    kind: Literal["dspark"]  # type: ignore[assignment]
    block_size: Annotated[int, Field(ge=2, description="anchor + proposals")] = 8


TRAITS = Traits(
    kind="dspark",
    shape=DSparkConfig,
    checkpoint="draftsmith.stages.drafters.dspark.checkpoint",
    recipe=TrainingRecipe(loss="ce_l1", gamma=4.0, reads_distribution=True),  # for the confidence
)
