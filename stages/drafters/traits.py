"""What an architecture is, for its model and for whoever plans with it: no torch here, and nothing that is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TrainingRecipe:
    """How an architecture's authors train it on the target's answers, but where something else was found better."""

    loss: str  # of a position, by its name in `stages/training/losses.py`
    gamma: float  # offset k has the weight exp(-(k-1)/gamma)
    sampled_loss: str | None = None  # on answers that were sampled, if another one

    def loss_on(self, *, sampled: bool) -> str:
        """On answers that were sampled, or are greedy."""
        return self.sampled_loss or self.loss if sampled else self.loss


@dataclass(frozen=True)
class Traits:
    """Of one architecture: `TRAITS` of a module `draftsmith.stages.drafters.<kind>.traits`."""

    kind: str  # as in `drafter.kind` of a config
    recipe: TrainingRecipe
