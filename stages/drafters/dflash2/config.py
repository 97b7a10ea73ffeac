"""Traits of DFlash2, and the shape of a new drafter."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.spec import TrainingRecipe, Traits


class DFlash2Config(DFlashConfig):
    """Shape of a new DFlash2 drafter, or of the additions to a DFlash drafter that training starts from."""

    kind: Literal["dflash2"]  # type: ignore[assignment]
    conv_kernel_size: Annotated[
        int, Field(ge=0, description="taps of the convolutions around every sublayer; 0, with conv_group_size: none")
    ] = 2
    conv_group_size: Annotated[int, Field(ge=0, description="channels that share a dynamic kernel")] = 16
    selector_rank: Annotated[int, Field(ge=1, description="width of the tokens' codebooks")] = 256
    selector_top_k: Annotated[int, Field(ge=1, description="candidates of an offset")] = 16


TRAITS = Traits(
    kind="dflash2",
    shape=DFlash2Config,
    checkpoint="draftsmith.stages.drafters.dflash2.checkpoint",
    # on sampled answers the target's distribution is better: `tests/lab/README.md`
    recipe=TrainingRecipe(loss="cross_entropy", gamma=7.0, sampled_loss="ce_l1"),
)
