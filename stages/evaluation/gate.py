"""Declaration of stage `gate`: the challenger against the champion, rule by rule."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.stages.runtime.stage import Config, Stage


class GateConfig(Config):
    """What a challenger must show."""

    min_tau_gain: Annotated[
        float, Field(ge=0, description="share of the champion's tau that the challenger's must be above it, measurably")
    ] = 0.0
    max_set_loss: Annotated[
        float, Field(ge=0, le=1, description="share of tau that a single prompt set may lose, before it is measurable")
    ] = 0.02
    max_speed_loss: Annotated[
        float, Field(ge=0, le=1, description="share of the champion's speed that may be lost, before it is measurable")
    ] = 0.02
    min_speedup: Annotated[
        float,
        Field(ge=0, description="over decoding without a drafter; the challenger must be measurably above it"),
    ] = 1.0
    judge_speed: Annotated[
        bool, Field(description="false: tau alone decides, where no meaningful speed can be measured")
    ] = True
    max_margin: Annotated[
        float,
        Field(
            ge=0,
            description="logits: where outputs in the serving dtype differ from those without a drafter, the "
            "largest margin that is a near-tie",
        ),
    ] = 1.0


STAGE = Stage(
    name="gate",
    config=GateConfig,
    inputs=("evaluation", "champion?", "sft", "opd", "control?"),
    body="draftsmith.stages.evaluation.gate_rules",
    volatile=("metrics.jsonl", GateDecision.FILE),
    reads_volatile=("evaluation",),
)
