"""The comparison of drafter architectures: each trained by SFT and by OPD, all measured in one evaluation.

The graph, with a branch for every name in section `drafters`::

    target ─ prompts ─ rollout ─ sft-NAME ─ mining-NAME ─ opd-NAME
                       fresh ──┴──────────┴─ control-NAME          SFT continued for as long as OPD
                       heldout ─ evaluation                        all of them on the same prompts, in turns
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from draftsmith.flows.checks.check import RunChecks
from draftsmith.flows.checks.measurable import require_measurable
from draftsmith.flows.experiments.arms import AnyTarget, target_node
from draftsmith.flows.pipeline.graph import Node, Pipeline
from draftsmith.flows.pipeline.options import RunOptions
from draftsmith.stages.contract import Config
from draftsmith.stages.measure.config import PREFIX, EvaluationConfig
from draftsmith.stages.mining import MiningConfig
from draftsmith.stages.prompts import PromptsConfig
from draftsmith.stages.rollout import RolloutConfig
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.on_policy.config import OpdConfig

TRAININGS = ("sft", "control", "opd")


class DrafterTrainings(Config):
    """How one drafter is trained."""

    sft: SftConfig
    opd: OpdConfig


class ArchitecturesConfig(RunOptions):
    """Several drafters for one target. Their training is matched by steps; the table shows the operations it took."""

    kind: Literal["architectures"]
    target: AnyTarget
    prompts: PromptsConfig
    rollout: RolloutConfig
    """The answers that SFT is trained on."""
    fresh: RolloutConfig
    """The answers that are mined, and that OPD and the continued SFT are trained on."""
    drafters: dict[str, DrafterTrainings] = Field(min_length=1)
    mining: MiningConfig = MiningConfig()
    heldout: RolloutConfig
    """The answers to held-out prompts, which all are compared on."""
    evaluation: EvaluationConfig

    @model_validator(mode="after")
    def _names_are_plain(self) -> ArchitecturesConfig:
        for name in self.drafters:
            if ":" in name or "-" in name:
                raise ValueError(f"drafters.{name}: choose a name without colons and dashes")
        return self

    @model_validator(mode="after")
    def _what_is_measured_is_there(self) -> ArchitecturesConfig:
        require_measurable(self.heldout, self.prompts, evaluation=self.evaluation)
        return self

    @model_validator(mode="after")
    def _time_limits_name_nodes(self) -> ArchitecturesConfig:
        self.stages.require_nodes([node.name for node in architectures_nodes(self)])
        return self


def arm(training: str, name: str) -> str:
    """The evaluation's name of a drafter."""
    return f"{name} {training}"


def architectures_nodes(config: ArchitecturesConfig) -> list[Node]:
    """All nodes of the comparison."""
    target = {"target": "target"}
    asked = {**target, "prompts": "prompts"}
    nodes = [
        target_node(config.target),
        Node("prompts", "draftsmith.stages.prompts", config.prompts, target),
        Node("rollout", "draftsmith.stages.rollout", config.rollout, asked),
        Node("fresh", "draftsmith.stages.rollout", config.fresh, asked),
        Node("heldout", "draftsmith.stages.rollout", config.heldout, asked),
    ]
    measured = {**asked, "trajectories": "heldout"}
    for name, trained in config.drafters.items():
        sft, mining = f"sft-{name}", f"mining-{name}"
        learned = {**target, "trajectories": "fresh", "drafter": sft}
        control = trained.sft.continued(trained.opd)
        nodes += [
            Node(sft, "draftsmith.stages.sft", trained.sft, {**target, "trajectories": "rollout"}),
            Node(f"control-{name}", "draftsmith.stages.sft", control, learned),
            Node(mining, "draftsmith.stages.mining", config.mining, learned),
            Node(f"opd-{name}", "draftsmith.stages.opd", trained.opd, {**learned, "mined": mining}),
        ]
        measured |= {f"{PREFIX}{arm(training, name)}": f"{training}-{name}" for training in TRAININGS}
    return [*nodes, Node("evaluation", "draftsmith.stages.evaluation", config.evaluation, measured)]


ARCHITECTURES = Pipeline(
    config=ArchitecturesConfig,
    nodes=architectures_nodes,
    flow="draftsmith.flows.experiments.flow:architectures",
    checks=RunChecks,
    headline="evaluation",
    results="draftsmith.flows.experiments.architectures_results:show_results",
)
