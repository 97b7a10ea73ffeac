"""What a DFlash2 is."""

from __future__ import annotations

from draftsmith.stages.drafters.traits import TrainingRecipe, Traits

TRAITS = Traits(
    kind="dflash2",
    # of sampled answers the target's distribution: `tests/lab/README.md`
    recipe=TrainingRecipe(loss="cross_entropy", gamma=7.0, sampled_loss="ce_l1"),
)
