"""Compares drafters without training any: config and graph of `draftsmith evaluate`."""

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
from draftsmith.flows.refresh.registry_commands import verify_checkpoint
from draftsmith.flows.refresh.summary import compared
from draftsmith.stages.catalog import STAGES
from draftsmith.stages.data.prompts import PromptsConfig
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.stage import DRAFTERS, PREFIX, EvaluationConfig
from draftsmith.stages.target.config import TargetConfig
from draftsmith.stages.training.config import SftConfig


class EvaluateConfig(RunOptions):
    """Drafters by name, and the sections of a refresh that measure them."""

    target: TargetConfig
    prompts: PromptsConfig
    heldout: RolloutConfig
    evaluation: EvaluationConfig
    drafters: dict[PlainName, str] = Field(min_length=1)
    """Folder or hub id of each drafter, by name."""


def evaluate_nodes(config: EvaluateConfig) -> list[Node]:
    """Return the nodes of target, held-out answers, every drafter untrained, and one evaluation against the first."""
    target = {"target": "target"}
    asked = {**target, "prompts": "prompts"}
    nodes = [
        *first_nodes(config.target, config.prompts),
        Node("heldout", STAGES["rollout"], config.heldout, asked),
    ]
    measured = {**asked, "trajectories": "heldout"}
    for name, source in config.drafters.items():
        untrained = SftConfig(steps=0, init_from=source, adopt=True)
        nodes.append(Node(name, STAGES["sft"], untrained, {**target, "trajectories": "heldout"}))
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


_RESERVED = {"target", "prompts", "heldout", "evaluation", "plain", *DRAFTERS}  # names of nodes and of a refresh's arms


def evaluate_config(refresh: RefreshConfig, drafters: list[str]) -> EvaluateConfig:
    """Return the config that compares drafters: folders, hub ids, or `LINE@alias` of the registry."""
    sources: dict[str, str] = {}
    for text in drafters:
        name, source = resolve_drafter(text)
        while name in _RESERVED or name in sources:
            name = f"{name}-{len(sources) + 1}"
        sources[name] = source
    sections = {
        name: getattr(refresh, name) for name in ("target", "prompts", "heldout", "evaluation", "stages", "seed")
    }
    return EvaluateConfig(name=f"{refresh.name}-evaluate", drafters=sources, **sections)


def resolve_drafter(text: str) -> tuple[str, str]:
    """Return (name of the arm, folder or hub id) of a drafter that a command names."""
    if Path(text).expanduser().is_dir():
        folder = Path(text).expanduser().resolve()
        inner = folder / "drafter"
        folder = inner if (inner / "config.json").is_file() else folder
        return _arm_name((folder.parent if folder.name == "drafter" else folder).name), str(folder)
    if "@" in text:
        return _arm_name(text), str(verify_checkpoint(registry().resolve(text)))
    path = Path(text)
    # `owner/name` is a hub id unless a folder `owner` exists here; the checks look for it on the hub
    if text.startswith((".", "/", "~")) or len(path.parts) != 2 or path.parent.is_dir():
        raise DraftsmithError(f"{text}: no such folder. Give a drafter's folder, a hub id or NAME@champion.")
    return _arm_name(text.replace("/", "-")), text


def _arm_name(name: str) -> str:
    return re.sub(r"^\W|[^\w@.+-]", "_", name)
