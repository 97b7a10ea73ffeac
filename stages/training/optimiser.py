"""AdamW, whole on every rank or with its moments split over them; one state dict, whatever trained it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from draftsmith.stages.parallel.ranks import ALONE, Ranks
from draftsmith.stages.training.config import OptimiserConfig


def make_optimiser(
    parameters: Iterable[torch.nn.Parameter], config: OptimiserConfig, ranks: Ranks = ALONE
) -> torch.optim.Optimizer:
    """Split if the config says so: every rank then moves its part of the weights and sends it to the others."""
    settings: dict[str, Any] = {
        "lr": config.learning_rate,
        "betas": (0.9, 0.95),
        "weight_decay": config.weight_decay,
        "fused": True,  # one pass over weights, gradients and moments
    }
    if ranks.world > 1 and config.parallel.shard_optimiser:
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return ZeroRedundancyOptimizer(list(parameters), torch.optim.AdamW, **settings)
    return torch.optim.AdamW(parameters, **settings)


def restore(optimiser: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """From `whole_state`. Moments that are split are taken with their counts of steps on the CPU, where the fused step
    on a GPU does not look for them (pytorch/pytorch#124133)."""
    optimiser.load_state_dict(state)
    own = getattr(optimiser, "optim", optimiser)
    for parameter, values in own.state.items():
        values["step"] = values["step"].to(parameter.device)


def whole_state(optimiser: torch.optim.Optimizer, ranks: Ranks) -> dict[str, Any] | None:
    """AdamW's own state dict on the first rank, None on others. All call it."""
    consolidate = getattr(optimiser, "consolidate_state_dict", None)
    if consolidate is not None:
        consolidate(to=0)
    return optimiser.state_dict() if ranks.first else None
