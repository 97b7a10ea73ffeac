"""Experiments: one starting drafter, several ways to train it on, several seeds, one comparison.

The graph of an experiment (in brackets: only where its config has the section)::

    target ─ prompts ─ rollout ─ sft                    the drafter that everything starts from
       └─ [revision] ─ [adoption]                       a new revision of the target, the old drafter taken over
    [fresh_prompts] ─ fresh ─ mining                    what the arms learn from
    arm-STEPS-sSEED …                                   every arm, for every number of steps and every seed; the earlier
                                                        iterations of it, and what they mined, have -I at the end
    heldout ─ comparison, [heldout_before ─ before]     acceptance on identical trajectories, and before the change
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from draftsmith.flows.checks.check import RunChecks
from draftsmith.flows.checks.measurable import require_measurable
from draftsmith.flows.pipeline.config_file import merged
from draftsmith.flows.pipeline.graph import Node, Pipeline
from draftsmith.flows.pipeline.options import PlainName, RunOptions
from draftsmith.stages.contract import Config
from draftsmith.stages.experiments.comparison import BASE, EARLIER, PREFIX, ComparisonConfig
from draftsmith.stages.experiments.procedural_target import ProceduralTargetConfig
from draftsmith.stages.mining import MiningConfig
from draftsmith.stages.prompts import PromptsConfig
from draftsmith.stages.rollout import RolloutConfig
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.training.config import SftConfig
from draftsmith.stages.training.on_policy.config import OpdConfig


def _target_kind(value: Any) -> str:
    kind = value.get("kind", "") if isinstance(value, dict) else getattr(value, "kind", "")
    return "procedural" if kind == "procedural" else "model"


AnyTarget = Annotated[
    Annotated[ProceduralTargetConfig, Tag("procedural")] | Annotated[TargetConfig, Tag("model")],
    Discriminator(_target_kind),
]


def target_node(config: TargetConfig | ProceduralTargetConfig) -> Node:
    """What an experiment's drafters are for."""
    procedural = isinstance(config, ProceduralTargetConfig)
    stage = "experiments.procedural_target" if procedural else "target"
    return Node("target", f"draftsmith.stages.{stage}", config)


class ArmConfig(Config):
    """One way to train on."""

    stage: Literal["sft", "opd"]
    init: Annotated[
        Literal["base", "random"], Field(description="from the starting drafter, or from scratch (sft only)")
    ] = "base"
    change: Annotated[
        dict[str, Any], Field(default_factory=dict, description="fields of section sft or opd that this arm changes")
    ]
    budgets: Annotated[tuple[int, ...] | None, Field(description="optimiser steps; left out: the experiment's")] = None
    iterations: Annotated[
        int, Field(ge=1, description="the steps in so many parts, each mining with the drafter of the one before (opd)")
    ] = 1

    @model_validator(mode="after")
    def _fits_its_stage(self) -> ArmConfig:
        if self.init == "random" and self.stage != "sft":
            raise ValueError("init: random is for stage sft: OPD starts from a drafter that was mined")
        if self.iterations > 1 and self.stage != "opd":
            raise ValueError("iterations are of stage opd: SFT mines nothing")
        if "steps" in self.change:
            raise ValueError("change.steps: say it in the arm's budgets, by which results are compared")
        if "init_from" in self.change or ("drafter" in self.change and self.init == "base"):
            raise ValueError(
                "change: the arm starts from the starting drafter; init: random makes one of another shape"
            )
        return self


class ExperimentConfig(RunOptions):
    """One experiment."""

    kind: Literal["experiment"]
    target: AnyTarget
    revision: ProceduralTargetConfig | None = None
    """A new revision of the target, trained on from it; the old drafter is then the starting point."""
    prompts: PromptsConfig
    fresh_prompts: PromptsConfig | None = None
    """Other traffic than the starting drafter was trained for."""
    rollout: RolloutConfig
    """The answers that the starting drafter is trained on."""
    sft: SftConfig
    """The starting drafter; arms of stage sft change single fields of it."""
    fresh: RolloutConfig
    """The answers that the arms learn from."""
    mining: MiningConfig = MiningConfig()
    opd: OpdConfig
    """What arms of stage opd change single fields of."""
    heldout: RolloutConfig
    """The answers that drafters are compared on."""
    arms: dict[PlainName, ArmConfig] = Field(min_length=1)
    budgets: tuple[int, ...] = Field(min_length=1)
    """Optimiser steps; every number is a training of its own, with its own learning-rate schedule."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0, 1, 2), min_length=1)
    comparison: ComparisonConfig

    @model_validator(mode="after")
    def _arms_are_valid(self) -> ExperimentConfig:
        if self.comparison.control not in self.arms:
            raise ValueError(f"comparison.control: no arm {self.comparison.control!r}, use one of {sorted(self.arms)}")
        for name, arm in self.arms.items():
            if name == BASE:
                raise ValueError(f"arms.{name}: choose another name than {BASE!r}")
            if arm.iterations > (least := min(self.budgets_of(name))):
                raise ValueError(f"arms.{name}: {least} steps cannot be trained in {arm.iterations} iterations")
            try:
                self.arm_config(arm, self.budgets[0])
            except ValueError as error:
                raise ValueError(f"arms.{name}.change: {error}") from error
        return self

    @model_validator(mode="after")
    def _every_training_once(self) -> ExperimentConfig:
        lists = {"seeds": self.seeds, "budgets": self.budgets}
        lists |= {f"arms.{name}.budgets": arm.budgets for name, arm in self.arms.items() if arm.budgets}
        for name, values in lists.items():
            if twice := sorted(value for value, count in Counter(values).items() if count > 1):
                raise ValueError(f"{name}: {', '.join(map(str, twice))} stands twice: keep one")
        return self

    @model_validator(mode="after")
    def _something_is_compared(self) -> ExperimentConfig:
        control = self.comparison.control
        own, others = set(self.budgets_of(control)), [name for name in self.arms if name != control]
        if others and own.isdisjoint(steps for name in others for steps in self.budgets_of(name)):
            trained = f"arms.{control}.budgets" if self.arms[control].budgets else "budgets"
            raise ValueError(
                f"{trained}: no other arm is trained for the {_listed(own)} steps of the control {control}, so that "
                "nothing is compared: give them a number of steps in common"
            )
        return self

    @model_validator(mode="after")
    def _time_limits_name_nodes(self) -> ExperimentConfig:
        self.stages.require_nodes([node.name for node in experiment_nodes(self)])
        return self

    @model_validator(mode="after")
    def _what_is_compared_is_there(self) -> ExperimentConfig:
        for prompts in (self.prompts, self.fresh_prompts or self.prompts):
            require_measurable(self.heldout, prompts, answered=self.comparison.splits)
        return self

    def budgets_of(self, arm: str) -> tuple[int, ...]:
        """Optimiser steps of its trainings."""
        return self.arms[arm].budgets or self.budgets

    def arm_config(self, arm: ArmConfig, steps: int) -> SftConfig | OpdConfig:
        """The stage's config of an arm: what SFT and OPD have in common is OPD's for every arm."""
        config = self.opd if arm.stage == "opd" else self.sft.continued(self.opd)
        return type(config).model_validate(merged(config.model_dump() | {"steps": steps}, arm.change))


def _listed(budgets: Iterable[int]) -> str:
    return " and ".join(map(str, sorted(budgets)))


def experiment_nodes(config: ExperimentConfig) -> list[Node]:
    """All nodes of an experiment."""
    current, base, prompts = {"target": "target"}, "sft", "prompts"
    old = dict(current)
    nodes = [
        target_node(config.target),
        Node("prompts", "draftsmith.stages.prompts", config.prompts, old),
        Node("rollout", "draftsmith.stages.rollout", config.rollout, {**old, "prompts": "prompts"}),
        Node("sft", "draftsmith.stages.sft", config.sft, {**old, "trajectories": "rollout"}),
    ]
    if config.revision is not None:
        current, base = {"target": "revision"}, "adoption"
        nodes.append(Node("revision", "draftsmith.stages.experiments.procedural_target", config.revision, old))
        adopted = SftConfig(steps=0, adopt=True)
        taken_over = {**current, "drafter": "sft", "trajectories": "fresh"}
        nodes.append(Node("adoption", "draftsmith.stages.sft", adopted, taken_over))
    if config.fresh_prompts is not None:
        prompts = "fresh_prompts"
        nodes.append(Node(prompts, "draftsmith.stages.prompts", config.fresh_prompts, current))
    asked = {**current, "prompts": prompts}
    nodes += [
        Node("fresh", "draftsmith.stages.rollout", config.fresh, asked),
        Node("heldout", "draftsmith.stages.rollout", config.heldout, asked),
        Node(
            "mining", "draftsmith.stages.mining", config.mining, {**current, "drafter": base, "trajectories": "fresh"}
        ),
    ]
    drafters = {f"{PREFIX}{BASE}:0:0": base}
    for name, arm in config.arms.items():
        for steps in config.budgets_of(name):
            for seed in config.seeds:
                made = _arm_nodes(f"{name}-{steps}-s{seed}", config, arm, steps, current, base, seed)
                nodes += made
                *earlier, last = [node for node in made if node.module == f"draftsmith.stages.{arm.stage}"]
                drafters[f"{PREFIX}{name}:{steps}:{seed}"] = last.name
                for i, node in enumerate(earlier, 1):
                    drafters[f"{EARLIER}{name}:{steps}:{seed}:{i}"] = node.name
    nodes.append(
        Node(
            "comparison",
            "draftsmith.stages.experiments.comparison",
            config.comparison,
            {**asked, "trajectories": "heldout", **drafters},
        )
    )
    if current != old or prompts != "prompts":  # what the starting drafter was worth before the change
        before = {**old, "prompts": "prompts"}
        nodes.append(Node("heldout_before", "draftsmith.stages.rollout", config.heldout, before))
        compared = {**before, "trajectories": "heldout_before", f"{PREFIX}{BASE}:0:0": "sft"}
        nodes.append(Node("before", "draftsmith.stages.experiments.comparison", config.comparison, compared))
    return nodes


def _arm_nodes(
    name: str, config: ExperimentConfig, arm: ArmConfig, steps: int, current: dict[str, str], base: str, seed: int
) -> list[Node]:
    """The nodes of one arm, one budget and one seed: one training, or one an iteration and the minings between them."""
    learned = {**current, "trajectories": "fresh"}
    if arm.stage == "sft":
        inputs = learned if arm.init == "random" else {**learned, "drafter": base}
        return [Node(name, "draftsmith.stages.sft", config.arm_config(arm, steps), inputs, seed=seed)]
    nodes: list[Node] = []
    drafter, mining = base, "mining"
    for i in range(arm.iterations):
        part = steps * (i + 1) // arm.iterations - steps * i // arm.iterations
        if i > 0:
            mining = f"mining-{name}-{i}"
            nodes.append(Node(mining, "draftsmith.stages.mining", config.mining, {**learned, "drafter": drafter}))
        inputs = {**learned, "drafter": drafter, "mined": mining}
        drafter = name if i == arm.iterations - 1 else f"{name}-{i + 1}"
        of_part = seed + 1000 * i  # other batches than the part before
        nodes.append(Node(drafter, "draftsmith.stages.opd", config.arm_config(arm, part), inputs, seed=of_part))
    return nodes


EXPERIMENT = Pipeline(
    config=ExperimentConfig,
    nodes=experiment_nodes,
    flow="draftsmith.flows.experiments.flow:experiment",
    checks=RunChecks,
    results="draftsmith.flows.experiments.arms_results:show_results",
)
