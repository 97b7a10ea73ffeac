"""Comparing drafters without training any: the graph and the config of `draftsmith evaluate`."""

from __future__ import annotations

import re
from pathlib import Path

from pydantic import Field

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.checks.check import RunChecks
from draftsmith.flows.config.options import PlainName, RunOptions
from draftsmith.flows.planning.graph import Node, Pipeline
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.graph import first_nodes
from draftsmith.flows.refresh.line import registry
from draftsmith.flows.refresh.summary import compared
from draftsmith.stages.catalog import STAGES
from draftsmith.stages.data.prompts import PromptsConfig
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.config import DRAFTERS, PREFIX, EvaluationConfig
from draftsmith.stages.target.config import TargetConfig
from draftsmith.stages.training.config import SftConfig


class EvaluateConfig(RunOptions):
    """Drafters by name, and the sections of a refresh that measure."""

    target: TargetConfig
    prompts: PromptsConfig
    heldout: RolloutConfig
    evaluation: EvaluationConfig
    drafters: dict[PlainName, str] = Field(min_length=1)
    """Name -> folder or hub id."""


def evaluate_nodes(config: EvaluateConfig) -> list[Node]:
    """Target, held-out answers, every drafter as it is, one evaluation; the others are compared with the first."""
    target = {"target": "target"}
    asked = {**target, "prompts": "prompts"}
    nodes = [
        *first_nodes(config.target, config.prompts),
        Node("heldout", STAGES["rollout"], config.heldout, asked),
    ]
    measured = {**asked, "trajectories": "heldout"}
    for name, source in config.drafters.items():
        taken = SftConfig(steps=0, init_from=source, adopt=True)
        nodes.append(Node(name, STAGES["sft"], taken, {**target, "trajectories": "heldout"}))
        measured[f"{PREFIX}{name}"] = name
    return [*nodes, Node("evaluation", STAGES["evaluation"], config.evaluation, measured)]


EVALUATE = Pipeline(
    config=EvaluateConfig,
    nodes=evaluate_nodes,
    flow="draftsmith.flows.refresh.flow:evaluate",
    checks=RunChecks,
    results="draftsmith.flows.refresh.summary:show_results",
    headline="evaluation",
    compared=compared,
)


_TAKEN = {"target", "prompts", "heldout", "evaluation", "plain", *DRAFTERS}  # nodes, and arms of a refresh


def evaluate_config(refresh: RefreshConfig, drafters: list[str]) -> EvaluateConfig:
    """Of the drafters that a command names: folders, hub ids, or `LINE@alias` of the registry."""
    named: dict[str, str] = {}
    for text in drafters:
        name, source = resolve_drafter(text)
        while name in _TAKEN or name in named:
            name = f"{name}-{len(named) + 1}"
        named[name] = source
    measured = {
        part: getattr(refresh, part) for part in ("target", "prompts", "heldout", "evaluation", "stages", "seed")
    }
    return EvaluateConfig(name=f"{refresh.name}-evaluate", drafters=named, **measured)


def resolve_drafter(text: str) -> tuple[str, str]:
    """(name of the arm, source) of what a command names."""
    if Path(text).expanduser().is_dir():
        folder = Path(text).expanduser().resolve()
        inner = folder / "drafter"
        folder = inner if (inner / "config.json").is_file() else folder
        return _plain((folder.parent if folder.name == "drafter" else folder).name), str(folder)
    if "@" in text:
        from draftsmith.flows.refresh.registry_commands import verified

        return _plain(text), str(verified(registry().resolve(text)))
    path = Path(text)
    # `owner/name` is a hub id, unless there is a folder `owner` here; the checks ask the hub for it
    if text.startswith((".", "/", "~")) or len(path.parts) != 2 or path.parent.is_dir():
        raise DraftsmithError(f"{text}: no such folder. Give a drafter's folder, a hub id or NAME@champion.")
    return _plain(text.replace("/", "-")), text


def _plain(name: str) -> str:
    return re.sub(r"^\W|[^\w@.+-]", "_", name)
