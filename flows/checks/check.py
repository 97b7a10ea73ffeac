"""The checks of a run. `draftsmith check` makes all of them and prints the list; a run raises the first error.

An error is something that the run cannot get past, a warning something that will work less well. What could not be
checked here is neither: a hub that cannot be reached says nothing about the config, and the machine that will run may
well reach it. A run checks what it knows when it knows it: before its first stage, when the target is there, and when
the prompts are.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.checks.comparisons import check_gate, check_sampling
from draftsmith.flows.checks.engines import check_engines, check_heads, check_parallel, check_shared_target
from draftsmith.flows.checks.findings import Findings, FirstError
from draftsmith.flows.checks.models import (
    Plans,
    check_drafters,
    check_first_drafters,
    check_nodes,
    check_target,
    resolve_metadata,
)
from draftsmith.flows.checks.prompts import check_lengths, check_logs, check_longest, check_sources, check_supplies
from draftsmith.flows.checks.resources import check_accelerators, check_resources
from draftsmith.flows.config.options import RunOptions, check_runner
from draftsmith.flows.execution.machine import check_home, free_disk_bytes
from draftsmith.flows.orchestration import server
from draftsmith.flows.planning.graph import Node, Pipeline, PlannedNode, Status, plan, topological_order
from draftsmith.stages.data.logs.rehearsal_stage import EarlierConfig, is_here
from draftsmith.stages.data.prompts import PromptsConfig
from draftsmith.stages.target.info import read_target_info


def check(config: RunOptions, pipeline: Pipeline, home: Path) -> Findings:
    """All checks of a config that fits its schema, without loading weights. They leave nothing behind, but for MLflow's
    database, which is asked for the champion of a line, and an empty object in the bucket of a store."""
    found = Findings()
    found.ok("schema", f"{config.name}: every field is known and in range")
    with found.part("home"):
        new = not home.exists()
        check_home(home, config)
        if new:
            home.rmdir()
        open_store(home).check()
        found.ok("home", f"{home} can be written, {free_disk_bytes(home) / 1e9:.0f} GB free")
    with found.part("databases"):
        Tracking(home).check_file_system()
        server.check_place(home)
    with found.part("runner"):
        check_runner(config.stages)
    for field, program in config.called.items():
        if shutil.which(program) is None:
            found.warn(field, f"{program}: no such program here that can be run: correct it, or say where it is")
    nodes: list[Node] = []
    with found.part("graph"):
        nodes = topological_order(pipeline.nodes(config))
        found.ok("graph", f"{len(nodes)} nodes: {', '.join(node.name for node in nodes)}")
    to_make = nodes
    with found.part("plan"):
        planned = plan(config, open_store(home), pipeline)
        nodes = [item.node for item in planned]
        to_make = [item.node for item in planned if item.status is not Status.HIT]
        states = [item.status.value for item in planned]
        found.ok("plan", ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
        for notice in filter(None, [item.newer_files_notice for item in planned]):
            found.ok("plan", notice)
    _without_target(found, nodes, nodes)
    with tempfile.TemporaryDirectory(prefix="draftsmith-check-") as scratch:
        if resolve_metadata(found, nodes, Path(scratch)):
            plans = _with_target(found, nodes, nodes, Path(scratch), whole=False)
            with found.part("resources"):
                check_resources(found, nodes, to_make, Path(scratch), plans, home, config.stages.price_per_hour)
        else:
            check_logs(found, nodes, None)
            check_first_drafters(found, nodes)
    return found


def _without_target(found: Findings, nodes: Sequence[Node], to_make: Sequence[Node]) -> None:
    """What the config alone says. to_make: the nodes that are not done."""
    _check_earlier(found, to_make)
    check_sampling(found, nodes)
    check_gate(found, nodes)
    check_supplies(found, nodes)
    check_sources(found, to_make)
    check_engines(found, to_make)
    check_parallel(found, to_make)


def _check_earlier(found: Findings, to_make: Sequence[Node]) -> None:
    """The answers that a line's champion was trained on: asked for before held-out prompts are answered."""
    for node in to_make:
        with found.part(node.name):
            if isinstance(node.config, EarlierConfig) and not is_here(node.config):
                raise DraftsmithError(
                    f"{node.config.folder}: the answers of the champion's refresh are not here: restore them, or set "
                    "logs.replay_share to 0"
                )


def _with_target(
    found: Findings, nodes: Sequence[Node], to_make: Sequence[Node], artifact: Path, *, whole: bool
) -> Plans:
    """What target and drafters say. artifact: of the target; whole: with its weights."""
    with found.part("target"):
        check_target(found, to_make, artifact)
    plans = check_drafters(found, nodes, artifact, whole=whole)
    check_longest(found, to_make, read_target_info(artifact).max_positions)
    check_nodes(found, to_make, artifact, whole=whole)
    check_shared_target(found, to_make, artifact)
    check_heads(found, to_make, artifact)
    check_logs(found, to_make, artifact)
    with found.part("GPUs"):
        check_accelerators(found)
    return plans


class RunChecks:
    """The same checks in the course of a run. Raises the first error as DraftsmithError."""

    def before(self, planned: Sequence[PlannedNode]) -> list[str]:
        """Check before the first stage. Returns warnings and what was not checked, a line each."""
        self._nodes = [item.node for item in planned]
        self._to_make = [item.node for item in planned if item.status is not Status.HIT]
        found = FirstError()
        _without_target(found, self._nodes, self._to_make)
        check_first_drafters(found, self._to_make)
        return found.remarks

    def after(self, node: Node, made: Mapping[str, Path]) -> list[str]:
        """Check when a node is done. made: artifacts by node. Returns lines as above."""
        found = FirstError()
        if not self._to_make:
            return []
        if node.stage.name == "target":
            target = made[node.name]
            plans = _with_target(found, self._nodes, self._to_make, target, whole=True)
            with found.part("resources"):
                check_resources(found, self._nodes, self._to_make, target, plans, home())
        elif isinstance(node.config, PromptsConfig):
            positions = read_target_info(made[node.inputs["target"]]).max_positions
            check_lengths(found, self._to_make, node.name, made[node.name], positions)
        return found.remarks


def check_alone(node: Node, inputs: Mapping[str, Path]) -> list[str]:
    """Check a node that is made alone. inputs: artifacts by the names of the stage's inputs. Returns lines as above."""
    found = FirstError()
    check_engines(found, [node])
    check_parallel(found, [node])
    if "target" in inputs:
        check_nodes(found, [node], inputs["target"], whole=True)
        check_shared_target(found, [node], inputs["target"])
    return found.remarks
