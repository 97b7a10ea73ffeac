"""The graph of a run: its nodes in order, and what a command selects of them."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.stage import Config, Stage


@dataclass(frozen=True)
class Node:
    """One use of a stage in a run. Several nodes may use the same stage with other configs and inputs."""

    name: str
    module: str  # of the stage, e.g. "draftsmith.stages.training.sft.stage"
    config: Config
    inputs: Mapping[str, str] = field(default_factory=dict)  # name of the stage's input -> name of the node
    seed: int | None = None  # None: the run's seed

    @property
    def stage(self) -> Stage:
        stage: Stage = importlib.import_module(self.module).STAGE
        return stage


@dataclass(frozen=True)
class Selection:
    """The part of a graph that a command selects. A name is a node's, or a stage's, which means all its nodes."""

    force: tuple[str, ...] = ()  # nodes to make again although the store has them
    start: tuple[str, ...] = ()  # `--from`: the first nodes; what does not follow from them must be in the store
    until: tuple[str, ...] = ()  # nodes to make, with all that they need; empty: the whole graph
    reuse_listing: bool = False  # read the files that the last run listed, although that run has ended
    alone: bool = False  # of `draftsmith stage`, which neither begins nor ends a run

    @classmethod
    def from_options(
        cls,
        force: Collection[str] | None,
        start: Collection[str] | None,
        until: Collection[str] | None,
        *,
        deployed: bool = False,
    ) -> Selection:
        """Return the selection of a command, or of a deployment's run.

        A person who names nodes repeats a part of the last run, so its listing is reused. A deployment names the same
        nodes in every run, which does not mean this.
        """
        repeats = bool(start or force) and not deployed
        return cls(tuple(force or ()), tuple(start or ()), tuple(until or ()), reuse_listing=repeats)

    @classmethod
    def of_stage(cls, node: str, *, force: bool) -> Selection:
        """Return the selection of `draftsmith stage`: one node, with its inputs from the store."""
        return cls((node,) if force else (), (node,), (node,), reuse_listing=True, alone=True)

    def nodes(self, graph: Sequence[Node]) -> list[Node]:
        """Return the nodes of `until` and all that they need, in order."""
        ordered = topological_order(graph)
        if not self.until:
            return ordered
        names = nodes_named(ordered, self.until, "stage" if self.alone else "--until")
        for node in reversed(ordered):
            if node.name in names:
                names |= set(node.inputs.values())
        return [node for node in ordered if node.name in names]

    def forced(self, nodes: Sequence[Node]) -> set[str]:
        """Return the names of the nodes to make again. Raises DraftsmithError for an unknown name."""
        return nodes_named(nodes, self.force, "--force")

    def asked(self, nodes: Sequence[Node]) -> set[str]:
        """Return the names of the nodes that a person asked for, by `--force` and `--from`."""
        return {*self.forced(nodes), *self.start}

    def check_names(self, graph: Sequence[Node]) -> None:
        """Raise DraftsmithError for a name that the graph does not have."""
        nodes_named(nodes := self.nodes(graph), self.start, "--from")
        self.forced(nodes)


ALL_NODES = Selection()


def topological_order(nodes: Sequence[Node]) -> list[Node]:
    """Return the nodes as given, but each after its inputs. Raises DraftsmithError for an invalid graph."""
    by_name = {node.name: node for node in nodes}
    if len(by_name) != len(nodes):
        twice = sorted(name for name, count in Counter(node.name for node in nodes).items() if count > 1)
        raise DraftsmithError(f"two nodes have the same name: {', '.join(twice)}")
    for node in nodes:
        _check_inputs(node, by_name)
    ordered: list[Node] = []
    waiting = list(nodes)
    while waiting:
        placed = {node.name for node in ordered}
        ready = next((node for node in waiting if placed.issuperset(node.inputs.values())), None)
        if ready is None:
            raise DraftsmithError(f"nodes need each other: {', '.join(node.name for node in waiting)}")
        ordered.append(ready)
        waiting.remove(ready)
    return ordered


def _check_inputs(node: Node, by_name: Mapping[str, Node]) -> None:
    stage = node.stage
    declared = {name.removesuffix("?") for name in stage.inputs}
    prefixes = tuple(name.removesuffix("*") for name in stage.inputs if name.endswith("*"))
    required = {name for name in stage.inputs if not name.endswith(("?", "*"))}
    if unknown := {name for name in set(node.inputs) - declared if not (prefixes and name.startswith(prefixes))}:
        raise DraftsmithError(f"node {node.name}: stage {stage.name} has no input {', '.join(sorted(unknown))}")
    if missing := required - set(node.inputs):
        raise DraftsmithError(f"node {node.name}: stage {stage.name} needs the input {', '.join(sorted(missing))}")
    for source in node.inputs.values():
        if source not in by_name:
            raise DraftsmithError(f"node {node.name}: its input comes from node {source}, which is not in the graph")


def nodes_named(nodes: Sequence[Node], names: Collection[str], option: str) -> set[str]:
    """Return the nodes that an option names by their own name or their stage's. Raises DraftsmithError for no node."""
    selected: set[str] = set()
    for name in names:
        matches = {node.name for node in nodes if node.name == name}
        matches = matches or {node.name for node in nodes if node.stage.name == name}
        if not matches:
            raise DraftsmithError(f"{option} {name}: no such node. Use one of: {', '.join(n.name for n in nodes)}.")
        selected |= matches
    return selected
