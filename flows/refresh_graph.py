"""The graph of a refresh: which stage reads which artifact."""

from __future__ import annotations

from flows.config import RunConfig, control_config
from flows.graph import Node, Pipeline


def refresh_nodes(config: RunConfig) -> list[Node]:
    """The nodes of one refresh, from the target to the report."""
    target = {"target": "target"}
    drafters = {"sft": "sft", "opd": "opd"}
    nodes = [
        Node("target", "stages.target", config.target),
        Node("prompts", "stages.prompts", config.prompts, target),
        Node("rollout", "stages.rollout", config.rollout, {**target, "prompts": "prompts"}),
        Node("sft", "stages.sft", config.sft, {**target, "trajectories": "rollout"}),
        Node("assisted", "stages.rollout", config.assisted, {**target, "prompts": "prompts", "drafter": "sft"}),
        Node("mining", "stages.mining", config.mining, {**target, "drafter": "sft", "trajectories": "assisted"}),
        Node(
            "opd",
            "stages.opd",
            config.opd,
            {**target, "drafter": "sft", "trajectories": "assisted", "steps": "mining"},
        ),
        Node("heldout", "stages.rollout", config.heldout, {**target, "prompts": "prompts"}),
    ]
    if config.refresh.control:
        drafters["control"] = "control"
        nodes.append(
            Node(
                "control",
                "stages.sft",
                control_config(config),
                {**target, "drafter": "sft", "trajectories": "assisted"},
            )
        )
    return [
        *nodes,
        Node(
            "evaluation",
            "stages.evaluation",
            config.evaluation,
            {**target, "prompts": "prompts", "trajectories": "heldout", **drafters},
        ),
        Node("report", "stages.report", config.report, {"mining": "mining", "evaluation": "evaluation", **drafters}),
    ]


REFRESH = Pipeline(config=RunConfig, nodes=refresh_nodes, flow="flows.refresh:refresh")
