"""`draftsmith check`: everything that can be known of a run before it starts, without loading weights.

Every check runs, whatever the others find. A warning is something that could not be checked here, or that will work
less well; an error is something that the run cannot get past. A hub that cannot be reached is a warning: it says
nothing about the config, and the machine that will run may well reach it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from draftsmith.artifacts.store import Store
from draftsmith.flows.checks.engines import check_engines
from draftsmith.flows.checks.findings import Findings
from draftsmith.flows.checks.models import check_models
from draftsmith.flows.checks.preflight import check_home, check_node
from draftsmith.flows.checks.prompts import check_prompts
from draftsmith.flows.checks.resources import check_resources
from draftsmith.flows.pipeline.graph import Node, Pipeline, in_order, plan
from draftsmith.flows.pipeline.machine import free_disk_bytes
from draftsmith.flows.pipeline.options import RunOptions


def check(config: RunOptions, pipeline: Pipeline, home: Path) -> Findings:
    """All checks of a config that fits its schema; leaves nothing behind."""
    found = Findings()
    found.ok("schema", f"{config.name}: every field is known and in range")
    with found.part("home"):
        new = not home.exists()
        check_home(home, config)
        if new:
            home.rmdir()
        found.ok("home", f"{home} can be written, {free_disk_bytes(home) / 1e9:.0f} GB free")
    nodes: list[Node] = []
    with found.part("graph"):
        nodes = in_order(pipeline.nodes(config))
        found.ok("graph", f"{len(nodes)} nodes: {', '.join(node.name for node in nodes)}")
    with found.part("plan"):
        states = [item.status.value for item in plan(config, Store(home / "store"), pipeline)]
        found.ok("plan", ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
    check_prompts(found, nodes)
    elsewhere = check_engines(found, nodes)
    with tempfile.TemporaryDirectory(prefix="draftsmith-check-") as scratch:
        models = check_models(found, nodes, Path(scratch))
        if models is None:
            return found
        for node in nodes:
            with found.part(node.name):
                if check_node(node, models.artifact, metadata_only=True):
                    found.ok(node.name, "its settings fit the target")
        with found.part("sizes"):
            check_resources(found, nodes, models, home, elsewhere=elsewhere)
    return found
