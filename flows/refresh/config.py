"""The config of a refresh: one frozen model is YAML schema, flow parameter, overrides, MLflow's params and keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from draftsmith.flows.checks.measurable import require_measurable
from draftsmith.flows.pipeline.config_file import read_config
from draftsmith.flows.pipeline.options import RunOptions
from draftsmith.stages.contract import Config
from draftsmith.stages.logs import LogsConfig
from draftsmith.stages.measure.config import EvaluationConfig
from draftsmith.stages.mining import MiningConfig
from draftsmith.stages.prompting.sources import SPLITS
from draftsmith.stages.prompts import PromptsConfig
from draftsmith.stages.report import ReportConfig
from draftsmith.stages.rollout import RolloutConfig
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.on_policy.config import OpdConfig


class RefreshOptions(Config):
    """Which comparisons the refresh makes beside the drafters themselves."""

    control: bool = True
    """Also continue SFT for as many steps and blocks as OPD: the drafter that OPD has to beat."""
    iterations: Annotated[int, Field(ge=1)] = 1
    """How often rollout, mining, OPD and evaluation follow each other, every time from the drafter before and on the
    prompts behind those of the iteration before (logged answers: on the same ones, in other batches)."""


class RefreshConfig(RunOptions):
    """One refresh of a drafter."""

    refresh: RefreshOptions = RefreshOptions()
    target: TargetConfig
    prompts: PromptsConfig
    logs: LogsConfig | None = None
    """Answers that the target gave in production. They take the place of `rollout` and of `assisted`, which may then be
    left out and are not read: SFT is trained on them, they are mined with the SFT drafter, and OPD is trained on them.
    Only held-out prompts are answered by the target here."""
    rollout: RolloutConfig | None = None
    """The target's answers that SFT is trained on."""
    sft: SftConfig
    assisted: RolloutConfig | None = None
    """Rollout with the SFT drafter in the loop: the trajectories that are mined and that OPD is trained on."""
    mining: MiningConfig
    opd: OpdConfig
    heldout: RolloutConfig
    """The target's answers to held-out prompts, which drafters are compared on."""
    evaluation: EvaluationConfig
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _answers_come_from_somewhere(self) -> RefreshConfig:
        if self.logs is None:
            for name in ("rollout", "assisted"):
                if getattr(self, name) is None:
                    raise ValueError(f"{name} is required: give this section, or logs with answers of the target")
        return self

    @model_validator(mode="after")
    def _what_is_measured_is_there(self) -> RefreshConfig:
        require_measurable(self.heldout, self.prompts, evaluation=self.evaluation)
        return self

    @model_validator(mode="after")
    def _iterations_have_prompts(self) -> RefreshConfig:
        if self.refresh.iterations == 1 or self.assisted is None or self.logs is not None:
            return self
        if self.assisted.prompts is None:
            raise ValueError("assisted.prompts: say how many an iteration takes, with refresh.iterations above 1")
        needed = self.assisted.skip + self.refresh.iterations * self.assisted.prompts
        available = sum(self.prompts.wanted(split) for split in SPLITS if split in self.assisted.splits)
        if needed > available:
            raise ValueError(
                f"refresh.iterations: {self.refresh.iterations} iterations need {needed} prompts and section prompts "
                f"has {available}: raise prompts.train, or lower assisted.prompts or the iterations"
            )
        return self

    @model_validator(mode="after")
    def _time_limits_name_nodes(self) -> RefreshConfig:
        known = {*type(self).model_fields, "control"} - {*RunOptions.model_fields, "refresh"}
        for name in self.stages.time_limits:
            if name not in known:
                raise ValueError(f"stages.time_limits.{name}: no such node, use one of: {', '.join(sorted(known))}")
        return self


def control_config(config: RefreshConfig) -> SftConfig:
    """The control of a refresh."""
    return config.sft.continued(config.opd)


def assisted_config(config: RefreshConfig, iteration: int) -> RolloutConfig:
    """The assisted rollout of an iteration, counted from 1: each takes the prompts behind those of the one before."""
    assert config.assisted is not None
    behind = (iteration - 1) * (config.assisted.prompts or 0)
    return config.assisted.model_copy(update={"skip": config.assisted.skip + behind})


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RefreshConfig:
    """The config of a refresh from a YAML file, with overrides such as `opd.steps=200`."""
    return read_config(path, overrides, RefreshConfig)
