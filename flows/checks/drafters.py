"""Which nodes of a graph make a drafter, which read it, and on which engine they draft."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from draftsmith.flows.planning.graph import Node
from draftsmith.stages.drafters.champion import ChampionConfig
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.evaluation.config import DRAFTERS
from draftsmith.stages.training.config import SftConfig


def trains_anew(node: Node) -> bool:
    """Whether a drafter comes into being there, rather than being trained on."""
    return isinstance(node.config, SftConfig) and "drafter" not in node.inputs


def brings(node: Node) -> bool:
    """Whether a run has its first drafter from there: from a stage that trains it anew, or from the registry."""
    return trains_anew(node) or isinstance(node.config, ChampionConfig)


def drafters_of(node: Node, by_name: Mapping[str, Node]) -> list[Node]:
    """Where a run has the drafters from that a node reads, as far as those nodes are known."""
    found: list[Node] = []
    for source in (by_name.get(source) for name, source in node.inputs.items() if is_drafter(name)):
        if source is not None:
            found += [source] if brings(source) else drafters_of(source, by_name)
    return list({origin.name: origin for origin in found}.values())


def sglang_engine(node: Node) -> SGLangEngineConfig | None:
    engine = getattr(node.config, "engine", None)
    return engine if isinstance(engine, SGLangEngineConfig) else None


def drafts_on_sglang(node: Node) -> bool:
    """Whether SGLang is to draft with a trained drafter there."""
    return sglang_engine(node) is not None and any(is_drafter(name) for name in node.inputs)


def sglang_engines(nodes: Sequence[Node]) -> list[tuple[SGLangEngineConfig, list[str]]]:
    """The different SGLang sections of a run (by interpreter and servers), each with the nodes that use it."""
    found: dict[tuple[object, ...], tuple[SGLangEngineConfig, list[str]]] = {}
    for node in nodes:
        if (engine := sglang_engine(node)) is not None:
            found.setdefault((engine.python, engine.urls, engine.trace), (engine, []))[1].append(node.name)
    return list(found.values())


def is_drafter(name: str) -> bool:
    """Of a stage's input."""
    return name in DRAFTERS or name.startswith("drafter")
