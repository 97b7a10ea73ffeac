"""Traits of DFlash, and the shape of a new drafter."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from draftsmith.stages.drafters.spec import DrafterShape, TrainingRecipe, Traits


class DFlashConfig(DrafterShape):
    """Shape of a new DFlash drafter. By default sizes follow the target, as in z-lab's checkpoints."""

    kind: Literal["dflash"] = "dflash"
    num_layers: Annotated[int, Field(ge=1, description="decoder layers")] = 5
    block_size: Annotated[int, Field(ge=2, description="anchor + proposals")] = 16
    target_layer_ids: Annotated[
        tuple[int, ...] | None,
        Field(description="layer k = the hidden state AFTER target layer k; default: spread over the depth"),
    ] = None
    num_target_features: Annotated[
        int | None, Field(ge=1, description="target layers to spread; default: one per drafter layer")
    ] = None
    mask_token: Annotated[
        str | int | None,
        Field(
            description="a token of the target's vocabulary, or the id of an unused row of its embedding; by default "
            "the first that no text contains, which `draftsmith check` names"
        ),
    ] = None

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.target_layer_ids is not None and self.num_target_features is not None:
            raise ValueError("give target_layer_ids or num_target_features, not both")
        return self


TRAITS = Traits(
    kind="dflash",
    shape=DFlashConfig,
    checkpoint="draftsmith.stages.drafters.dflash.checkpoint",
    recipe=TrainingRecipe(loss="cross_entropy", gamma=7.0),
)
