"""Memory and disk that a run will need, node by node, from its config and the sizes of target and drafter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from draftsmith.flows.checks.drafters import is_drafter
from draftsmith.flows.pipeline.graph import Node
from draftsmith.stages.estimates import ESTIMATES
from draftsmith.stages.prompting.sources import SPLITS
from draftsmith.stages.prompts import PromptsConfig
from draftsmith.stages.targets.estimate import Estimate, Sizes, Use


@dataclass(frozen=True)
class Parts:
    """What is needed, by part, in bytes."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def __str__(self) -> str:
        largest = sorted(self.parts.items(), key=lambda item: -item[1])
        return f"{gigabytes(self.total)}: " + ", ".join(
            f"{name} {gigabytes(value)}" for name, value in largest if value >= 0.02 * self.total
        )


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 0.95e8 else f"{size / 1e6:.0f} MB"


def estimates(nodes: Sequence[Node], sizes: Sizes) -> dict[str, Estimate]:
    """Of every node whose stage says what it needs. nodes: each behind its inputs."""
    found: dict[str, Estimate] = {}
    by_name = {node.name: node for node in nodes}
    for node in nodes:
        if (estimate := ESTIMATES.get(node.stage.name)) is not None:
            found[node.name] = estimate(node.config, _use(node, by_name, found, sizes))
    return found


def _use(node: Node, by_name: Mapping[str, Node], found: Mapping[str, Estimate], sizes: Sizes) -> Use:
    prompts = by_name[node.inputs["prompts"]].config if "prompts" in node.inputs else None
    counts: dict[str, int] = {}
    if isinstance(prompts, PromptsConfig):
        counts = {split: prompts.wanted(split) for split in SPLITS}
    source = found.get(node.inputs.get("trajectories", ""))
    answers = source.makes if source is not None else None
    drafters = sum(is_drafter(name) for name in node.inputs)
    return Use(sizes, counts, drafters, answers)


def disk(found: Mapping[str, Estimate]) -> dict[str, float]:
    """Bytes of the store, by what they are; tables before compression, so an upper bound.

    Shards of the running stage stand beside its tables: the largest counts twice. What is there only while a stage runs
    counts once.
    """
    tables = [estimate.tables for estimate in found.values()]
    parts = {"trajectories and traces": sum(tables) + max(tables, default=0.0)}
    for estimate in found.values():
        for name, size in estimate.files.items():
            parts[name] = parts.get(name, 0.0) + size
        for name, size in estimate.passing.items():
            parts[name] = max(parts.get(name, 0.0), size)
    return {name: size for name, size in parts.items() if size}
