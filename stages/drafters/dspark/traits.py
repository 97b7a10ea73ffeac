"""What a DSpark is."""

from __future__ import annotations

from draftsmith.stages.drafters.traits import TrainingRecipe, Traits

TRAITS = Traits(kind="dspark", recipe=TrainingRecipe(loss="ce_l1", gamma=4.0))
