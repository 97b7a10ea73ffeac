"""What a DFlash is."""

from __future__ import annotations

from draftsmith.stages.drafters.traits import TrainingRecipe, Traits

TRAITS = Traits(kind="dflash", recipe=TrainingRecipe(loss="cross_entropy", gamma=7.0))
