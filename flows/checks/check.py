"""Runs the checks of a config. `draftsmith check` prints all results; a run raises the first error.

An error stops the run, a warning means that something will work less well. A skipped check is neither: if the hub
cannot be reached here, the machine that will run may still reach it. A run makes each check as early as it can: before
its first stage, when the target is ready, and when the prompts are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.host import GpuModel
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.checks.drafters import check_gate, check_sampling
from draftsmith.flows.checks.engines import (
    check_engines,
    check_parallel,
    check_served_targets,
    check_shared_target,
)
from draftsmith.flows.checks.findings import Findings, RaisingFindings
from draftsmith.flows.checks.hours import check_hours
from draftsmith.flows.checks.logs import ReadSample, check_answers, check_logs
from draftsmith.flows.checks.memory import Hardware, check_accelerators, check_memory
from draftsmith.flows.checks.models import (
    DrafterPlans,
    check_drafters,
    check_initial_drafters,
    check_stage_settings,
    check_target,
    fetch_target_metadata,
    fetch_weights,
)
from draftsmith.flows.checks.prompts import check_lengths, check_max_lengths, check_prompt_counts, check_sources
from draftsmith.flows.config.options import RunOptions, check_runner
from draftsmith.flows.execution.machine import check_home, free_disk_bytes
from draftsmith.flows.orchestration import server
from draftsmith.flows.planning.graph import Node, topological_order
from draftsmith.flows.planning.plan import Build, Pipeline, Status, plan
from draftsmith.stages.data.logs.earlier import EarlierConfig, is_available
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.data.prompts.stage import PromptsConfig
from draftsmith.stages.targets.info import read_target_info


def check(config: RunOptions, pipeline: Pipeline, home: Path, gpu: GpuModel | None = None) -> Findings:
    """Make all checks of a valid config, and return their results. Weights are loaded only to test logged answers.

    gpu: GPUs to estimate memory and time for, instead of this machine's.
    The checks leave no files except MLflow's database, in which the line's champion is looked up, and an empty object
    in the store's bucket.
    """
    findings = Findings()
    findings.ok("schema", f"{config.name}: every field is known and in range")
    with findings.check("home"):
        new = not home.exists()
        check_home(home, config)
        if new:
            home.rmdir()
        open_store(home).check()
        findings.ok("home", f"{home} can be written, {free_disk_bytes(home) / 1e9:.0f} GB free")
    with findings.check("databases"):
        Tracking(home).check_file_system()
        server.check_database_location(home)
    with findings.check("runner"):
        check_runner(config.stages)
    nodes: list[Node] = []
    planned: Sequence[Build] = ()
    with findings.check("graph"):
        nodes = topological_order(pipeline.nodes(config))
        findings.ok("graph", f"{len(nodes)} nodes: {', '.join(node.name for node in nodes)}")
    to_make = nodes
    with findings.check("plan"):
        planned = plan(config, open_store(home), pipeline)
        nodes = [item.node for item in planned]
        to_make = [item.node for item in planned if item.status is not Status.HIT]
        states = [item.status.value for item in planned]
        findings.ok("plan", ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
        for notice in filter(None, [item.newer_files_notice for item in planned]):
            findings.ok("plan", notice)
    _without_target(findings, nodes, nodes)
    with tempfile.TemporaryDirectory(prefix="draftsmith-check-") as scratch:
        if fetch_target_metadata(findings, nodes, Path(scratch)):
            stored = [
                item.artifact.path for item in planned if item.artifact is not None and item.node.stage.name == "target"
            ]
            weights = None
            if any(isinstance(node.config, LogsConfig) and node.config.scored for node in nodes):
                with findings.check("target"):
                    weights = fetch_weights(nodes, Path(scratch), stored[0] if stored else None)
            test = partial(check_answers, findings, weights)
            plans = _with_target(findings, nodes, nodes, Path(scratch), whole=False, test=test)
            check_served_targets(findings, to_make, Path(scratch), stored[0] if stored else None)
            with findings.check("resources"):
                machine = Hardware.here() if gpu is None else Hardware((gpu.memory,), None, gpu)
                uses = check_memory(findings, nodes, to_make, Path(scratch), plans, home, machine)
                made = open_store(home).list() if gpu is None else []
                check_hours(findings, to_make, uses, config, made, machine.model)
        else:
            check_logs(findings, nodes, None)
            check_initial_drafters(findings, nodes)
    return findings


def _without_target(findings: Findings, nodes: Sequence[Node], to_make: Sequence[Node]) -> None:
    """Make the checks that need only the config. to_make: the nodes that are not in the store."""
    _check_earlier(findings, to_make)
    check_sampling(findings, nodes)
    check_gate(findings, nodes)
    check_prompt_counts(findings, nodes)
    check_sources(findings, to_make)
    check_engines(findings, to_make)
    check_parallel(findings, to_make)


def _check_earlier(findings: Findings, to_make: Sequence[Node]) -> None:
    """Check that the answers that the line's champion was trained on are in the store.

    If not, this fails before the run answers held-out prompts, which takes long.
    """
    for node in to_make:
        with findings.check(node.name):
            if isinstance(node.config, EarlierConfig) and not is_available(node.config):
                raise DraftsmithError(
                    f"{node.config.folder}: the answers of the champion's refresh are missing. Restore them, or set "
                    "logs.replay_share to 0."
                )


def _with_target(
    findings: Findings,
    nodes: Sequence[Node],
    to_make: Sequence[Node],
    artifact: Path,
    *,
    whole: bool,
    test: ReadSample | None = None,
) -> DrafterPlans:
    """Make the checks that need the target; return the drafters' plans.

    artifact: the target's folder. whole: it has its weights. test: see `check_logs`.
    """
    with findings.check("target"):
        check_target(findings, to_make, artifact)
    plans = check_drafters(findings, nodes, artifact, whole=whole)
    check_max_lengths(findings, to_make, read_target_info(artifact).max_positions)
    check_stage_settings(findings, to_make, artifact)
    check_shared_target(findings, to_make, artifact)
    check_logs(findings, to_make, artifact, test)
    with findings.check("GPUs"):
        check_accelerators(findings, to_make)
    return plans


def check_before(builds: Sequence[Build]) -> list[str]:
    """Make the checks of a plan before its first stage. Return warnings and skipped checks, one line each.

    Raises the first error as DraftsmithError.
    """
    findings, to_make = RaisingFindings(), _to_make(builds)
    if not to_make:
        return []
    _without_target(findings, [build.node for build in builds], to_make)
    check_initial_drafters(findings, to_make)
    return findings.remarks


def check_after(node: Node, builds: Sequence[Build], folders: Mapping[str, Path]) -> list[str]:
    """Make the checks that a node allows once it is made. Returns and raises like `check_before`.

    builds: the plan. folders: node -> folder of its artifact.
    """
    findings, nodes, to_make = RaisingFindings(), [build.node for build in builds], _to_make(builds)
    if not to_make:
        return []
    if node.stage.name == "target":
        target = folders[node.name]
        plans = _with_target(findings, nodes, to_make, target, whole=True)
        with findings.check("resources"):
            check_memory(findings, nodes, to_make, target, plans, home(), Hardware.here())
    elif isinstance(node.config, PromptsConfig):
        positions = read_target_info(folders[node.inputs["target"]]).max_positions
        check_lengths(findings, to_make, node.name, folders[node.name], positions)
    return findings.remarks


def _to_make(builds: Sequence[Build]) -> list[Node]:
    return [build.node for build in builds if build.status is not Status.HIT]
