"""The part of a graph that a run makes: from some nodes on, until some others."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.local import Store
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.planning.graph import (
    Node,
    Pipeline,
    PlannedNode,
    Status,
    forced_nodes,
    plan,
    select_nodes,
    topological_order,
)


@dataclass(frozen=True)
class Part:
    """What `--from` and `--until` name: nodes, or stages for all their nodes. Nothing: the whole graph."""

    start: tuple[str, ...] = ()
    until: tuple[str, ...] = ()

    @staticmethod
    def of(start: Collection[str] | None, until: Collection[str] | None) -> Part:
        return Part(tuple(start or ()), tuple(until or ()))

    def nodes(self, graph: Sequence[Node]) -> list[Node]:
        """The nodes of the run, in order: those of `until` and all that these need."""
        ordered = topological_order(graph)
        if not self.until:
            return ordered
        wanted = select_nodes(ordered, self.until, "--until")
        for node in reversed(ordered):
            if node.name in wanted:
                wanted |= set(node.inputs.values())
        return [node for node in ordered if node.name in wanted]

    def plan(
        self,
        config: RunOptions,
        store: Store,
        pipeline: Pipeline,
        force: Collection[str] = (),
        *,
        deployed: bool = False,
    ) -> list[PlannedNode]:
        """What a run of this part would do now. Raises DraftsmithError if `start` needs what is not there.

        deployed: `force` is of every run, and so says nothing of which nodes are wanted again.
        """
        nodes = self.nodes(pipeline.nodes(config))
        again = bool(self.start) or (bool(force) and not deployed)
        planned = plan(config, store, pipeline, force, nodes=nodes, again=again)
        if self.start:
            self._starts_from_the_store(planned, forced_nodes(nodes, force))
        return planned

    def _starts_from_the_store(self, planned: Sequence[PlannedNode], forced: Collection[str]) -> None:
        """What lies neither at nor behind `start` is there, or forced: the rerun of a late stage must not begin with
        hours of earlier ones because a field has changed."""
        made = select_nodes([item.node for item in planned], self.start, "--from") | set(forced)
        for item in planned:
            if made & set(item.node.inputs.values()):
                made.add(item.node.name)
        missing = [item.node.name for item in planned if item.status is not Status.HIT and item.node.name not in made]
        if missing:
            raise DraftsmithError(
                f"--from {', '.join(self.start)}: not in the store, and not behind it: {', '.join(missing)}: "
                f"`draftsmith why CONFIG {missing[0]}` says why; name them with --from as well, or leave it out"
            )
