"""Declaration of stage `drift`: the champion replayed on fresh answers of today's target, in minutes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.runtime.stage import Compute, Config, FilledIn, NotInKey, Stage


class DriftConfig(Config):
    """When a refresh goes on."""

    threshold: Annotated[
        float, Field(ge=0, le=1, description="share of its tau that the champion may have lost"), NotInKey()
    ] = 0.03
    max_age_days: Annotated[
        float,
        Field(gt=0, description="the line is refreshed anyway if its last refresh, promoted or not, is longer ago"),
        NotInKey(),
    ] = 90.0
    drafting: Annotated[DraftingConfig, FilledIn()] = DraftingConfig()
    """As drafters draft in the evaluation."""


STAGE = Stage(
    name="drift",
    config=DriftConfig,
    inputs=("target", "champion", "prompts", "trajectories"),
    body="draftsmith.stages.evaluation.drift_replay",
    compute=Compute.HEAVY,
)
