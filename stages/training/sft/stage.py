"""Declares stage `sft`: a warm start on the target's answers, from random weights or from an existing drafter.

It is also the control of a refresh: with a drafter as input, it continues SFT from there.
"""

from __future__ import annotations

from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.stage import Compute, ParallelConfig, Stage
from draftsmith.stages.training.config import SftConfig


def preflight(config: SftConfig, target: Path) -> None:
    """Check that the drafter to start from fits the target, before anything long runs."""
    # Here, as they load torch, and planning reads this module.
    from draftsmith.stages.drafters import checkpoint
    from draftsmith.stages.targets.info import model_path, read_target_info

    if config.init_from:
        folder = checkpoint.drafter_source(config.init_from, config.init_revision)
        if not config.adopt:
            checkpoint.check_drafter(folder, read_target_info(target))
        checkpoint.check_shape(folder, model_path(target))
        checkpoint.check_complete(folder)
    elif config.steps == 0:
        raise DraftsmithError("sft.steps: 0 steps train nothing. Name the drafter to take as it is in sft.init_from.")
    else:
        checkpoint.check_new(config.drafter, target)


STAGE = Stage(
    name="sft",
    config=SftConfig,
    inputs=("target", "trajectories", "drafter?"),
    body="draftsmith.stages.training.sft.trainer",
    preflight=preflight,
    compute=Compute.HEAVY,
    parallel=lambda config: config.parallel if config.steps else ParallelConfig(),
)
