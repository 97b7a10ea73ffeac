"""How OPD trains: the config section `opd`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from draftsmith.stages.training.config import TrainingConfig
from draftsmith.stages.training.loss_config import LossConfig, loss_file


class OpdConfig(TrainingConfig):
    """What is distilled, and where."""

    steps: Annotated[int, Field(ge=1)] = 400
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    verification: Annotated[
        Literal["auto", "greedy", "sampled"],
        Field(
            description="the rule that the drafter will serve under, which decides the loss where that is left open; "
            "auto: as the trajectories were drawn"
        ),
    ] = "auto"
    loss: Annotated[
        LossConfig,
        Field(
            description="matched: what fits the verification rule and the architecture; paper: Bernoulli forward KL on "
            "what verification committed plus k3 reverse KL on the rejected suffix; or the streams in full"
        ),
    ] = LossConfig()
    anchors: Annotated[
        Literal["errors", "visited", "successors", "random"],
        Field(
            description="mined verify steps that rejected something, all that were visited, successors (where a verify "
            "step of the current weights leads from positions all over the response), or positions whatever the "
            "drafter does there"
        ),
    ] = "successors"
    remine_every: Annotated[
        int | None,
        Field(
            ge=0,
            description="mine a trajectory again, with the current weights, when a batch draws it and its trace is so "
            "many steps old; 0: train on the trace as it was mined; left out: 1 where anchors are read off a trace",
        ),
    ] = None

    @property
    def reads_table(self) -> bool:
        """Return whether anchors are steps of the mined table, which then has to hold those of all answers."""
        return self.anchors in ("errors", "visited")

    @model_validator(mode="after")
    def _remines_a_trace(self) -> OpdConfig:
        if self.remine_every and not self.reads_table:
            raise ValueError(
                f"remine_every: anchors {self.anchors!r} are judged with the current weights anyway: set it to 0, or "
                "train on 'errors' or 'visited'"
            )
        return self

    def external_files(self) -> list[Path]:
        """Return the source of a named loss."""
        name = self.loss.response.loss
        return [loss_file(name)] if ":" in name else []

    @property
    def oldest_trace(self) -> int:
        """`remine_every` where it was left open too; 0: no trace is mined again."""
        if self.remine_every is not None:
            return self.remine_every
        return 1 if self.reads_table else 0
