"""The drafters in a graph: which nodes create, read or serve one, and whether they can be compared fairly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from draftsmith.artifacts.results.evaluation import CHAMPION
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.planning.graph import Node
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.data.prompts.stage import PromptsConfig
from draftsmith.stages.drafters.champion import ChampionConfig
from draftsmith.stages.engines.config import ServerEngineConfig, SGLangEngineConfig
from draftsmith.stages.engines.stage import RolloutConfig
from draftsmith.stages.evaluation.config import DRAFTERS, EvaluationConfig
from draftsmith.stages.evaluation.gate import GateConfig
from draftsmith.stages.evaluation.speed_warnings import fewest_prompts
from draftsmith.stages.evaluation.timed_runs import settings_of
from draftsmith.stages.evaluation.verdicts import FEWEST_RUNS
from draftsmith.stages.targets.sampling import SamplingParams
from draftsmith.stages.training.config import OpdConfig, SftConfig


def creates_drafter(node: Node) -> bool:
    """Return whether the node starts a drafter, rather than continuing one that the run has made."""
    return isinstance(node.config, SftConfig) and "drafter" not in node.inputs


def provides_drafter(node: Node) -> bool:
    """Return whether the node gives the run a drafter: a new one, or the registry's champion."""
    return creates_drafter(node) or isinstance(node.config, ChampionConfig)


def drafter_origins(node: Node, by_name: Mapping[str, Node]) -> list[Node]:
    """Return the nodes in `by_name` that provide the drafters which a node reads, directly or trained further."""
    origins: list[Node] = []
    for source in (by_name.get(source) for name, source in node.inputs.items() if is_drafter(name)):
        if source is not None:
            origins += [source] if provides_drafter(source) else drafter_origins(source, by_name)
    return list({origin.name: origin for origin in origins}.values())


def server_engine(node: Node) -> ServerEngineConfig | None:
    """Return the node's server section, None if it uses another engine or none."""
    engine = getattr(node.config, "engine", None)
    return engine if isinstance(engine, ServerEngineConfig) else None


def sglang_engine(node: Node) -> SGLangEngineConfig | None:
    """Return the node's SGLang section, None if it uses another engine or none."""
    engine = server_engine(node)
    return engine if isinstance(engine, SGLangEngineConfig) else None


def drafts_on_sglang(node: Node) -> bool:
    """Return whether SGLang drafts in this node, with a drafter that it reads from the run."""
    return sglang_engine(node) is not None and any(is_drafter(name) for name in node.inputs)


def server_engines(nodes: Sequence[Node]) -> list[tuple[ServerEngineConfig, list[str]]]:
    """Return a run's distinct server sections (interpreter, servers, device), each with the nodes that use it."""
    engines: dict[tuple[object, ...], tuple[ServerEngineConfig, list[str]]] = {}
    for node in nodes:
        if (engine := server_engine(node)) is not None:
            on_cpu = engine.launch is not None and engine.launch.on_cpu
            key = (engine.kind, engine.interpreter, engine.urls, on_cpu)
            engines.setdefault(key, (engine, []))[1].append(node.name)
    return list(engines.values())


def is_drafter(name: str) -> bool:
    """Return whether a stage's input of this name is a drafter."""
    return name in DRAFTERS or name.startswith("drafter")


def check_gate(findings: Findings, nodes: Sequence[Node]) -> None:
    """Warn if too few timed runs make every speed inconclusive, or if few prompts choose the challenger."""
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        if not isinstance(node.config, GateConfig):
            continue
        evaluation = by_name[node.inputs["evaluation"]]
        measured, prompts = evaluation.config, by_name[evaluation.inputs["prompts"]].config
        assert isinstance(measured, EvaluationConfig) and isinstance(prompts, PromptsConfig)
        chosen = [name for name in evaluation.inputs if is_drafter(name) and name != CHAMPION]
        if len(chosen) > 1 and (chosen_on := prompts.prompt_count("validation")) < FEWEST_RUNS:
            findings.warn(
                node.name,
                f"the challenger is chosen by chance: prompts.validation is {chosen_on}, and with fewer than "
                f"{FEWEST_RUNS} the spread of the drafters is unknown. Raise it.",
            )
        if not node.config.judge_speed:
            continue
        fewest = FEWEST_RUNS if measured.by_prompt else fewest_prompts(max(measured.concurrency))
        needed = [
            ("evaluation.rounds", measured.rounds, 1 if measured.by_prompt else FEWEST_RUNS),
            ("evaluation.speed_prompts", measured.speed_prompts, fewest),
            ("the number of held-out prompts,", prompts.prompt_count("heldout"), fewest),  # speed_prompts are a sample
        ]
        too_low = [f"{what} {has} (at least {least} are needed)" for what, has, least in needed if has < least]
        if too_low:
            findings.warn(
                node.name,
                f"cannot promote: speed stays inconclusive with {', '.join(too_low)}. Raise it, or let tau "
                "decide (gate.judge_speed: false).",
            )


def check_sampling(findings: Findings, nodes: Sequence[Node]) -> None:
    """Warn if tau is measured on answers that were sampled differently from OPD's or from the first speed setting's.

    Without OPD, the answers of SFT count.
    """
    configs = {node.name: node.config for node in nodes}
    trainings = [node for node in nodes if isinstance(node.config, OpdConfig)]
    trainings = trainings or [node for node in nodes if isinstance(node.config, SftConfig)]
    learned = {node.inputs["trajectories"] for node in trainings}
    for node in nodes:
        if not isinstance(node.config, EvaluationConfig):
            continue
        others = {name: _sampling_of(configs[name]) for name in sorted(learned)}
        first = settings_of(node.config)[0]
        others["the first speed"] = node.config.sampling.params(first.temperature)
        sampling = _sampling_of(configs[node.inputs["trajectories"]])
        unlike = ", ".join(f"{name} is {_describe(other)}" for name, other in others.items() if other != sampling)
        if unlike:
            findings.warn(
                node.name,
                f"sampling differs: tau is measured on answers that are {_describe(sampling)} (heldout.sampling), "
                f"{unlike}. Set every `sampling` as the drafter will serve.",
            )


def _sampling_of(config: object) -> SamplingParams:
    """Return the sampling of the answers that a node makes or reads."""
    if isinstance(config, LogsConfig):
        return config.sampling
    assert isinstance(config, RolloutConfig)
    return config.sampling.params()


def _describe(sampling: SamplingParams) -> str:
    return "greedy" if sampling.greedy else f"sampled at {sampling.temperature:g}, {sampling.truncation}"
