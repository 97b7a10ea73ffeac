"""Declares stage `opd`: on-policy distillation of the target's feedback on blocks where the drafter's own verification
leads.

After Draft-OPD, arXiv 2605.29343: draft from positions where verification continues (mined, or found under the current
weights), with gradient, and learn from what the target says about accepted and rejected proposals.
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
