"""SFT and OPD of a scale, assembled as the stages do it, on invented mined steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.config import OpdConfig, SftConfig
from draftsmith.stages.training.opd.body import MinedData, OpdTraining
from draftsmith.stages.training.sft.body import SftTraining
from draftsmith.stages.training.trainer import TrainingData
from tests.benchmarks.sft_step import invented_steps
from tests.stages.training.case import mined_table

TAU = 4.0  # of the invented verify steps
Training: TypeAlias = SftTraining | OpdTraining

# Nothing here accepts what it drafts, so traces mined again would be a step a token: they stay as they were mined.
KINDS: dict[str, dict[str, Any] | None] = {
    "SFT": None,
    "OPD": {},
    "OPD, the paper's losses": {"loss": "paper", "anchors": "errors", "remine_every": 0},
}


def make_training(
    kind: str, drafter: Drafter, target: Target, trajectories: Sequence[Trajectory], step: dict[str, Any]
) -> Training:
    """Return a training. kind: of KINDS. step: fields of TrainingConfig."""
    fields = KINDS[kind]
    if fields is None:
        data = TrainingData(trajectories=trajectories)
        return SftTraining(drafter, target, data, SftConfig.model_validate(step))
    rng, K = np.random.default_rng(1), drafter.block_size - 1
    table = mined_table([invented_steps(t, K, TAU, rng) for t in trajectories], K)
    mined = MinedData(trajectories=trajectories, mined=table)
    return OpdTraining(drafter, target, mined, OpdConfig.model_validate({**step, **fields}))
