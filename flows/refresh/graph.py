"""The graph of a refresh: its nodes, and which node reads which."""

from __future__ import annotations

from draftsmith.flows.checks.check import check_after, check_before
from draftsmith.flows.planning.graph import Node
from draftsmith.flows.planning.plan import Pipeline
from draftsmith.flows.refresh.champion import resolve
from draftsmith.flows.refresh.config import (
    RefreshConfig,
    control_config,
    drift_config,
    evaluation_config,
    mining_config,
    report_config,
    sft_config,
    starts_from_champion,
    waits_for_mining,
)
from draftsmith.flows.refresh.drift import early_end, sticky_force
from draftsmith.flows.refresh.screen import compared, review, show_results
from draftsmith.stages.catalog import STAGES
from draftsmith.stages.data.prompts.stage import PromptsConfig
from draftsmith.stages.targets.config import TargetConfig
from draftsmith.stages.training.config import OpdConfig


def first_nodes(target: TargetConfig, prompts: PromptsConfig) -> list[Node]:
    """Return the nodes that every graph starts with: target and prompts."""
    return [
        Node("target", STAGES["target"], target),
        Node("prompts", STAGES["prompts"], prompts, {"target": "target"}),
    ]


def refresh_nodes(config: RefreshConfig) -> list[Node]:
    """Return the nodes of one refresh, from the target to the report."""
    target = {"target": "target"}
    asked = {**target, "prompts": "prompts"}
    nodes = [
        *first_nodes(config.target, config.prompts),
        Node("heldout", STAGES["rollout"], config.heldout, asked),  # early: long stages follow
    ]
    champion = {}
    if config.champion is not None:  # its drift check comes before the long stages
        champion = {"champion": "champion"}
        nodes.append(Node("champion", STAGES["champion"], config.champion, target))
        checked = {**asked, **champion, "trajectories": "heldout"}
        nodes.append(Node("drift", STAGES["drift"], drift_config(config), checked))
    if config.logs is not None:
        answers, earlier = "logs", {}
        learned_from = config.registry.answers if config.registry is not None else None
        if learned_from is not None and (config.logs.replay_share or config.logs.overlaps):
            earlier = {"earlier": "earlier"}
            rehearsal = learned_from.model_copy(update={"replayed": config.logs.replay_share > 0})
            nodes.append(Node("earlier", STAGES["earlier"], rehearsal))
        nodes.append(Node(answers, STAGES["logs"], config.logs, {**asked, **earlier}))
    else:
        assert config.rollout is not None  # RefreshConfig has checked it
        answers = "rollout"
        nodes.append(Node(answers, STAGES["rollout"], config.rollout, asked))
    start = {"drafter": "champion"} if starts_from_champion(config) else {}
    nodes.append(
        Node(
            "sft",
            STAGES["sft"],
            sft_config(config),
            {**target, "trajectories": answers, **start},
        )
    )
    drafters, mining = {"sft": "sft"}, {}
    if config.opd is not None:
        nodes += opd_nodes(config, config.opd)
        drafters["opd"] = "opd"
        if config.refresh.control:
            drafters["control"] = "control"
        mining = {"mining": "mining"}
    measured = {**asked, "trajectories": "heldout", **champion, **drafters}
    reported = {**mining, "evaluation": "evaluation", **drafters}
    nodes.append(Node("evaluation", STAGES["evaluation"], evaluation_config(config), measured))
    if config.registry is not None:
        gated = {"evaluation": "evaluation", **champion, **drafters}
        nodes.append(Node("gate", STAGES["gate"], config.gate, gated))
        reported["gate"] = "gate"
        if champion:
            reported["drift"] = "drift"
    return [*nodes, Node("report", STAGES["report"], report_config(config), reported)]


def opd_nodes(config: RefreshConfig, opd: OpdConfig) -> list[Node]:
    """Return the nodes that follow SFT where there is OPD: answers with its drafter, OPD, mining, and the control."""
    nodes, answers, same_answers = list[Node](), "logs", True
    if config.logs is None:
        assert config.assisted is not None and config.rollout is not None  # RefreshConfig has checked it
        same_answers, answers = config.sft.steps > 0 and config.assisted.skip == config.rollout.skip, "assisted"
        asked = {"target": "target", "prompts": "prompts", "drafter": "sft"}
        nodes.append(Node(answers, STAGES["rollout"], config.assisted, asked))
    seed = config.seed + 1000 if same_answers else None  # of the same answers, other batches than SFT's
    training = {"target": "target", "trajectories": answers, "drafter": "sft"}
    mined = {"mined": "mining"} if waits_for_mining(config, opd) else {}
    nodes += [
        Node("opd", STAGES["opd"], opd, {**training, **mined}, seed),
        Node("mining", STAGES["mining"], mining_config(config, opd), training),
    ]
    if config.refresh.control:
        nodes.append(Node("control", STAGES["sft"], control_config(config, opd), training, seed))
    return nodes


class RefreshPipeline(Pipeline):
    """The refresh of a drafter, with or without a model line."""

    config = RefreshConfig
    flow = "draftsmith.flows.refresh.flow:refresh"
    data = ("prompts", "logs", "rollout", "assisted", "heldout")
    report = ("report", "report.html")

    nodes = staticmethod(refresh_nodes)
    resolve = staticmethod(resolve)
    early_end = staticmethod(early_end)
    sticky_force = staticmethod(sticky_force)
    compared = staticmethod(compared)
    review = staticmethod(review)
    show = staticmethod(show_results)
    check = staticmethod(check_before)
    check_after = staticmethod(check_after)

    def concludes(self, config: RefreshConfig) -> bool:
        return config.registry is not None


class WatchPipeline(RefreshPipeline):
    """The refresh whose servers a deployment watches."""

    flow = "draftsmith.flows.refresh.flow:watch"


REFRESH, WATCH = RefreshPipeline(), WatchPipeline()
