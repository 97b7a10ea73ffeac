"""Finds the nodes of a graph that create a drafter, read one, or draft on SGLang."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from draftsmith.flows.planning.graph import Node
from draftsmith.stages.drafters.stage import ChampionConfig
from draftsmith.stages.engines.config import SGLangEngineConfig
from draftsmith.stages.evaluation.stage import DRAFTERS
from draftsmith.stages.training.config import SftConfig


def creates_drafter(node: Node) -> bool:
    """Return whether the node creates a drafter rather than training one of the run further."""
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


def sglang_engine(node: Node) -> SGLangEngineConfig | None:
    """Return the node's SGLang section, None if it uses another engine or none."""
    engine = getattr(node.config, "engine", None)
    return engine if isinstance(engine, SGLangEngineConfig) else None


def drafts_on_sglang(node: Node) -> bool:
    """Return whether SGLang drafts with a trained drafter in this node."""
    return sglang_engine(node) is not None and any(is_drafter(name) for name in node.inputs)


def sglang_engines(nodes: Sequence[Node]) -> list[tuple[SGLangEngineConfig, list[str]]]:
    """Return the distinct SGLang sections of a run (by interpreter and servers), each with the nodes that use it."""
    engines: dict[tuple[object, ...], tuple[SGLangEngineConfig, list[str]]] = {}
    for node in nodes:
        if (engine := sglang_engine(node)) is not None:
            engines.setdefault((engine.python, engine.urls, engine.trace), (engine, []))[1].append(node.name)
    return list(engines.values())


def is_drafter(name: str) -> bool:
    """Return whether a stage's input of this name is a drafter."""
    return name in DRAFTERS or name.startswith("drafter")
