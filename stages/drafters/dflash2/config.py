"""Traits of DFlash2, and the shape of a new drafter."""

from __future__ import annotations

from typing import Literal

from draftsmith.stages.drafters.dflash.config import DFlashConfig
from draftsmith.stages.drafters.spec import TrainingRecipe, Traits


class DFlash2Config(DFlashConfig):
    """Shape of a new DFlash2 drafter, or of the additions to a DFlash drafter that training starts from."""

    kind: Literal["dflash2"]  # type: ignore[assignment]


TRAITS = Traits(
    kind="dflash2",
    shape=DFlash2Config,
    checkpoint="draftsmith.stages.drafters.dflash2.checkpoint",
    # on sampled answers the target's distribution is better: `tests/lab/README.md`
    recipe=TrainingRecipe(loss="cross_entropy", gamma=7.0, sampled_loss="ce_l1"),
)
