"""The config of a refresh: one frozen model is YAML schema, flow parameter, overrides, MLflow's params and keys."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import model_validator

from flows.config_file import read_config
from flows.options import RunOptions
from stages.contract import Config
from stages.evaluation import EvaluationConfig
from stages.mining import MiningConfig
from stages.opd import OpdConfig
from stages.prompts import PromptsConfig
from stages.report import ReportConfig
from stages.rollout import RolloutConfig
from stages.sft import SftConfig
from stages.targets.config import TargetConfig


class RefreshOptions(Config):
    """Which comparisons the refresh makes beside the drafters themselves."""

    control: bool = True
    """Also continue SFT for as many steps and trained positions as OPD: the drafter that OPD has to beat."""


class RunConfig(RunOptions):
    """One refresh of a drafter."""

    refresh: RefreshOptions = RefreshOptions()
    target: TargetConfig
    prompts: PromptsConfig
    rollout: RolloutConfig
    """The target's answers that SFT is trained on."""
    sft: SftConfig
    assisted: RolloutConfig
    """Rollout with the SFT drafter in the loop: the trajectories that are mined and that OPD is trained on."""
    mining: MiningConfig
    opd: OpdConfig
    heldout: RolloutConfig
    """The target's answers to validation and held-out prompts."""
    evaluation: EvaluationConfig
    report: ReportConfig = ReportConfig()

    @model_validator(mode="after")
    def _time_limits_name_nodes(self) -> RunConfig:
        known = {*type(self).model_fields, "control"} - {*RunOptions.model_fields, "refresh"}
        for name in self.stages.time_limits:
            if name not in known:
                raise ValueError(f"stages.time_limits.{name}: no such node, use one of: {', '.join(sorted(known))}")
        return self


_FROM_OPD = ("steps", "sequences_per_step", "anchors_per_sequence", "learning_rate", "warmup_fraction")


def control_config(config: RunConfig) -> SftConfig:
    """Continued SFT with OPD's steps, trained positions and learning rate: the fair comparison."""
    return config.sft.model_copy(update={name: getattr(config.opd, name) for name in _FROM_OPD})


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> RunConfig:
    """The config of a refresh from a YAML file, with overrides such as `opd.steps=200`."""
    return read_config(path, overrides, RunConfig)
