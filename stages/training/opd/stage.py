"""Declares stage `opd`: on-policy distillation on blocks at the anchors that the drafter's own verification reaches.

Source: Draft-OPD, arXiv 2605.29343. Blocks are drafted with gradient where verification continues (mined, or under the
current weights). The loss is the target's feedback on accepted and rejected proposals.
"""

from __future__ import annotations

from draftsmith.stages.runtime.stage import Compute, Stage
from draftsmith.stages.training.config import OpdConfig

STAGE = Stage(
    name="opd",
    config=OpdConfig,
    inputs=("target", "drafter", "trajectories", "mined?"),
    body="draftsmith.stages.training.opd.body",
    compute=Compute.HEAVY,
    parallel=lambda config: config.parallel,
)
