"""An experiment: arms that continue training one drafter in several ways, from one shared rollout, over several seeds.

The graph (in brackets: only where the config has the section)::

    target ─ prompts ─ rollout ─ sft                the drafter that every arm starts from
       └─ [revision ─ adoption]                     the target has changed, its old drafter is taken over
    [fresh_prompts] ─ fresh ─ mining                what the arms learn from
    ARM-STEPS-sSEED …                               every arm, for every number of steps and every seed
    heldout                                         what all of them are replayed on, in `results.py`

The first arm is the control. Target, revision and prompts are made of procedural text (`tests/testbed/procedural`) when
the graph is planned, once, and kept in the cache of the tests.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from pydantic import Field, field_validator, model_validator

from draftsmith.artifacts.identifiers import PlainName
from draftsmith.flows.checks.check import check_after, check_before
from draftsmith.flows.config.load import merge_configs
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import Display, EndedRun
from draftsmith.flows.orchestration.run import Run
from draftsmith.flows.planning.graph import Node
from draftsmith.flows.planning.plan import Pipeline, load_attribute
from draftsmith.flows.refresh.flow import make_and_compare
from draftsmith.stages.catalog import STAGES
from draftsmith.stages.data.prompts.stage import PromptsConfig
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.replay.stage import MiningConfig
from draftsmith.stages.runtime.stage import Config
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.training.config import OpdConfig, SftConfig
from tests.testbed import cache
from tests.testbed.procedural import text, training, worked
from tests.testbed.procedural.training import ShapeConfig, TrainingTextConfig, training_examples
from tests.testbed.target import trained_target

_PROMPTS_SEED = 1001
_SPARE = 2  # rows of the prompts' file for each that is asked for: a split takes only those of its class


class Arm(Config):
    """One way to continue training."""

    stage: Literal["sft", "opd"]
    init: Literal["base", "random"] = "base"
    """From the starting drafter, or from scratch (sft only)."""
    change: dict[str, Any] = Field(default_factory=dict)
    """Fields of section `sft` or `opd` that this arm changes."""


class PromptCounts(Config):
    """The number of prompts, and their families of text."""

    families: tuple[str, ...] = Field(min_length=1)
    train: int
    validation: int
    heldout: int


class LabConfig(RunOptions):
    """One experiment."""

    target: TrainingTextConfig
    shape: ShapeConfig = ShapeConfig()
    revision: TrainingTextConfig | None = None
    """Text that the target is trained further on; its old drafter is then the starting point."""
    prompts: PromptCounts
    fresh_prompts: PromptCounts | None = None
    """Other traffic than the starting drafter was trained for."""
    rollout: RolloutConfig
    """The answers that the starting drafter is trained on."""
    sft: SftConfig
    """The starting drafter; arms of stage sft change fields of it."""
    fresh: RolloutConfig
    """The answers that the arms learn from."""
    mining: MiningConfig = MiningConfig()
    opd: OpdConfig
    """What arms of stage opd change fields of. What SFT and OPD have in common, arms of stage sft take from here."""
    heldout: RolloutConfig
    """The answers that drafters are compared on."""
    arms: dict[PlainName, Arm] = Field(min_length=1)
    budgets: tuple[int, ...] = (400,)
    """Optimiser steps; each number is another training, with another schedule."""
    seeds: tuple[int, ...] = (0, 1, 2)

    @property
    def experiment(self) -> str:
        return "lab"

    @field_validator("budgets", "seeds")
    @classmethod
    def _are_different(cls, values: tuple[int, ...]) -> tuple[int, ...]:
        if not values or len(set(values)) < len(values):
            raise ValueError(f"{list(values)}: give at least one number, and each of them once")
        return values

    @model_validator(mode="after")
    def _arms_are_valid(self) -> LabConfig:
        for name, arm in self.arms.items():
            if arm.init == "random" and arm.stage != "sft":
                raise ValueError(f"arms.{name}.init: OPD starts from a drafter that was mined. Use stage sft.")
            try:
                self.arm_config(arm, self.budgets[0])
            except ValueError as error:
                raise ValueError(f"arms.{name}.change: {error}") from error
        return self

    def arm_config(self, arm: Arm, steps: int) -> SftConfig | OpdConfig:
        """Return the stage's config of an arm."""
        config = self.opd if arm.stage == "opd" else self.sft.continued(self.opd)
        return type(config).model_validate(merge_configs(config.model_dump() | {"steps": steps}, arm.change))


def lab_nodes(config: LabConfig) -> list[Node]:
    """Return all nodes of an experiment. Trains its targets if they are not in the cache."""
    folder = trained_target("lab-target", config.target, config.shape)
    current, base, prompts = "target", "sft", "prompts"
    asked = {"target": "target", "prompts": "prompts"}
    nodes = [
        Node("target", "draftsmith.stages.targets.stage", _target(folder)),
        Node("prompts", "draftsmith.stages.data.prompts.stage", _prompts(config, config.prompts), {"target": "target"}),
        Node("rollout", "draftsmith.stages.engines.stage", config.rollout, asked),
        Node(
            "sft", "draftsmith.stages.training.sft.stage", config.sft, {"target": "target", "trajectories": "rollout"}
        ),
    ]
    if config.revision is not None:
        current, base = "revision", "adoption"
        folder = trained_target("lab-revision", config.revision, config.shape, parent=folder)
        taken_over = {"target": current, "drafter": "sft", "trajectories": "fresh"}
        nodes += [
            Node("revision", "draftsmith.stages.targets.stage", _target(folder)),
            Node("adoption", "draftsmith.stages.training.sft.stage", SftConfig(steps=0, adopt=True), taken_over),
        ]
    if config.fresh_prompts is not None:
        prompts = "fresh_prompts"
        asked_anew = _prompts(config, config.fresh_prompts)
        nodes.append(Node(prompts, "draftsmith.stages.data.prompts.stage", asked_anew, {"target": current}))
    asked = {"target": current, "prompts": prompts}
    learned = {"target": current, "trajectories": "fresh"}
    mined = {**learned, "drafter": base}
    nodes += [
        Node("fresh", "draftsmith.stages.engines.stage", config.fresh, asked),
        Node("heldout", "draftsmith.stages.engines.stage", config.heldout, asked),
        Node("mining", "draftsmith.stages.replay.stage", config.mining, mined),
    ]
    for name, arm in config.arms.items():
        inputs = {"opd": {**mined, "mined": "mining"}, "sft": mined if arm.init == "base" else learned}[arm.stage]
        nodes += [
            Node(f"{name}-{n}-s{seed}", STAGES[arm.stage], config.arm_config(arm, n), inputs, seed=seed)
            for n in config.budgets
            for seed in config.seeds
        ]
    return nodes


def _target(folder: Path) -> TargetConfig:
    return TargetConfig(source=str(folder), dtype="float32")


def _prompts(config: LabConfig, counts: PromptCounts) -> PromptsConfig:
    """Return a source for each family, of rows that the target was not trained on."""

    def build(folder: Path) -> None:
        trained = frozenset(example.prompt for example in training_examples(config.target))
        rows = text.examples(_PROMPTS_SEED, count, exclude=trained, families=counts.families)
        lines = [json.dumps({"prompt": row.prompt, "family": row.family}) + "\n" for row in rows]
        (folder / "prompts.jsonl").write_text("".join(lines), "utf-8")

    count = _SPARE * (counts.train + counts.validation + counts.heldout)
    code: Sequence[Any] = (text, worked, training)
    path = cache.cached("lab-prompts", build, code=code, extra=f"{config.target} {counts.families} {count}")
    sources = [
        {"kind": "jsonl", "path": str(path / "prompts.jsonl"), "label": family, "filter": {"family": family}}
        for family in counts.families
    ]
    numbers = counts.model_dump(exclude={"families"})
    return PromptsConfig.model_validate({"sources": sources, "heldout_share": 0.3, **numbers})


class LabPipeline(Pipeline):
    """Trainings of one drafter in several ways."""

    config = LabConfig
    flow = "tests.lab.experiment:experiment"

    def nodes(self, config: LabConfig) -> list[Node]:
        return lab_nodes(config)

    check = staticmethod(check_before)
    check_after = staticmethod(check_after)

    def show(self, display: Display, folders: Mapping[str, Path], ended: EndedRun) -> None:
        load_attribute("tests.lab.results:show_results")(display, folders, ended)  # imports torch


LAB = LabPipeline()


@flow(name="experiment", flow_run_name="{config.name}", persist_result=False)
def experiment(
    config: LabConfig,
    force: list[str] | None = None,
    start: list[str] | None = None,
    until: list[str] | None = None,
) -> Any:
    """Continue training a drafter in several ways."""
    return Run.of(LAB, config, force, start, until).do(make_and_compare)
