"""What an EAGLE-3 is."""

from __future__ import annotations

import math

from draftsmith.stages.drafters.traits import TrainingRecipe, Traits

TRAITS = Traits(
    kind="eagle3",
    recipe=TrainingRecipe(loss="forward_kl", gamma=-1 / math.log(0.8)),  # 0.8 a step
)
