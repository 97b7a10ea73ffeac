"""The body of a flow: checks, then a task a node, in order, followed by MLflow."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State

from draftsmith.artifacts.home import home
from draftsmith.artifacts.manifest import ArtifactRef
from draftsmith.artifacts.tracking import Status, Tracking
from draftsmith.flows.pipeline.display import Display
from draftsmith.flows.pipeline.graph import Checks, Pipeline, forced_nodes, in_order, plan
from draftsmith.flows.pipeline.graph import Status as Planned
from draftsmith.flows.pipeline.machine import check_home
from draftsmith.flows.pipeline.node import Made, Workshop
from draftsmith.flows.pipeline.options import RunOptions
from draftsmith.flows.pipeline.task import run_node


def run_graph(config: RunOptions, pipeline: Pipeline, force: Collection[str] = ()) -> dict[str, dict[str, Any]]:
    """Body of a flow: make every node of the config's graph. Returns what each node's artifact is, by node.

    Raises the first `DraftsmithError`; whatever was finished before is in the store.
    """
    logging.getLogger("draftsmith").setLevel(logging.INFO)  # without it Prefect does not show the stages' lines
    workshop = Workshop(home(), config, pipeline, Display(), Tracking(home()))
    check_home(workshop.home, config)
    workshop.tracking.check()
    workshop.tracking.close_dead_runs(workshop.store)
    planned = plan(config, workshop.store, pipeline, force)
    checks = pipeline.checks() if pipeline.checks is not None else None
    _warn(workshop, checks.before(planned) if checks is not None else [])
    reused = {f"draftsmith.reused.{p.node.name}": p.ref.uri for p in planned if p.status is Planned.HIT and p.ref}
    run_id = workshop.tracking.open_refresh(config.name, config.model_dump(mode="json"), reused)
    workshop = dataclasses.replace(workshop, refresh_run=run_id)
    made: dict[str, Made] = {}
    status: Status = "KILLED"
    try:
        _make_all(workshop, force, made, checks)
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        workshop.tracking.close_refresh(status, _headline(workshop, made), _report(workshop, made))
        if status != "FINISHED" and (told := _still_forced(forced_nodes([p.node for p in planned], force), made)):
            workshop.display.line(told)
    return {name: _described(each) for name, each in made.items()}


def _warn(workshop: Workshop, warnings: Sequence[str]) -> None:
    for warning in warnings:
        workshop.display.line(f"warning: {warning}")


def _make_all(workshop: Workshop, force: Collection[str], made: dict[str, Made], checks: Checks | None) -> None:
    nodes = in_order(workshop.pipeline.nodes(workshop.config))
    forced = forced_nodes(nodes, force)
    states: dict[str, State[Any]] = {}
    for node in nodes:
        inputs: dict[str, ArtifactRef] = {name: made[source].ref for name, source in node.inputs.items()}
        upstream = [states[source] for source in dict.fromkeys(node.inputs.values())]
        made[node.name], states[node.name] = run_node(workshop, node, inputs, upstream, force=node.name in forced)
        if checks is not None:
            _warn(workshop, checks.after(node, {name: each.ref.path for name, each in made.items()}))


def _still_forced(forced: Collection[str], made: Mapping[str, Made]) -> str | None:
    """What to force in the next run, where some of it is done: else it would be made once more."""
    done = sorted(name for name in forced if name in made and not made[name].reused)
    rest = "".join(f" --force {name}" for name in sorted(set(forced) - set(done)))
    if not done:
        return None
    return f"{', '.join(done)}: made again and complete; go on{f' with{rest} only' if rest else ' without --force'}"


def _headline(workshop: Workshop, made: Mapping[str, Made]) -> dict[str, float]:
    node = made.get(workshop.pipeline.headline)
    return workshop.store.manifest(node.ref).metrics if node is not None else {}


def _report(workshop: Workshop, made: Mapping[str, Made]) -> list[Path]:
    name, file = workshop.pipeline.report
    path = made[name].ref.path / file if name in made else None
    return [path] if path is not None and path.is_file() else []


def _described(made: Made) -> dict[str, Any]:
    ref = made.ref
    return {
        "stage": ref.stage,
        "key": ref.key,
        "content_id": ref.content_id,
        "path": str(ref.path),
        "reused": made.reused,
    }
