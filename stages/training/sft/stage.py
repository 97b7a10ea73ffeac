"""Declares stage `sft`: a warm start on the target's answers, from random weights or from an existing drafter.

It is also the control of a refresh: with a drafter as input, it continues SFT from there.
"""

from __future__ import annotations

from draftsmith.stages.runtime.stage import Compute, ParallelConfig, Stage
from draftsmith.stages.training.config import SftConfig

STAGE = Stage(
    name="sft",
    config=SftConfig,
    inputs=("target", "trajectories", "drafter?"),
    body="draftsmith.stages.training.sft.body",
    compute=Compute.HEAVY,
    parallel=lambda config: config.parallel if config.steps else ParallelConfig(),
)
