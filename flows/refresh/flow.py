"""The flows of refresh, evaluate and diagnose, for commands, deployments and schedules.

A refresh makes the nodes of `refresh_nodes` in their order:

    target -> prompts -> heldout -> champion -> drift -> rollout or logs -> sft -> assisted -> opd, mining, control
    -> evaluation -> gate -> report

Mining comes before an OPD that reads its table, else after it. A refresh of a line ends after `drift` if its champion
is current. After the report it registers the challenger, and promotes it if the gate says so.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.deployments import run_deployment
from prefect.states import Completed, Failed

from draftsmith.artifacts.errors import DraftsmithError, RefusedError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.host import bypass_proxy_for_localhost
from draftsmith.artifacts.redaction import redact_logs
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.artifacts.store.manifest import Artifact, read_manifest
from draftsmith.artifacts.tracking.refresh_runs import link_version
from draftsmith.artifacts.tracking.registry import CHAMPION
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.execution.display import Display
from draftsmith.flows.orchestration.flow_run import announce, approved, run_task
from draftsmith.flows.orchestration.run import Run
from draftsmith.flows.planning.plan import Conclusion
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.drift import Drift, current, judge_drift
from draftsmith.flows.refresh.graph import REFRESH
from draftsmith.flows.refresh.measurements import DIAGNOSE, EVALUATE, DiagnoseConfig, EvaluateConfig
from draftsmith.flows.refresh.promotion import (
    NO_SERVERS,
    Swapped,
    conclusion_of,
    expected_champion,
    move_alias,
    swap_servers,
    tag_refreshed,
    tags_of,
    with_servers,
)
from draftsmith.flows.refresh.registry_commands import rollback
from draftsmith.flows.refresh.swap import served_by
from draftsmith.flows.refresh.versions import registry
from draftsmith.flows.refresh.watch import watch as watch_servers
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER

Names = list[str] | None


@flow(name="refresh", flow_run_name="{config.name}", persist_result=False)
def refresh(config: RefreshConfig, force: Names = None, start: Names = None, until: Names = None) -> Any:
    """Keep a drafter matched to its target: rollout, SFT, mining, distillation, evaluation.

    Args:
        config: The run, as in a YAML file of `configs/`.
        force: Nodes to make again although the store has them.
        start: Nodes to start from; all nodes that do not follow from them must be in the store.
        until: Make only these nodes and what they need; nothing is promoted.
    """
    return Run.of(REFRESH, config, force, start, until).do(make_and_promote)


def make_and_promote(run: Run) -> Conclusion | None:
    """Make the nodes of a refresh in order. A line's refresh ends at a current champion, or with a promotion."""
    config, drift, swapped = run.config, None, NO_SERVERS
    assert isinstance(config, RefreshConfig)
    for build in run.plan:
        run.make(build)
        if build.name == "drift" and run.whole:
            drift, swapped = run.retry(lambda: check_drift(config, run.folders, run.asked))
            if not drift.reasons:
                return with_servers(current(config, drift), swapped)
    run.show_comparison()
    if not run.whole or config.registry is None:  # `--until` lets a person look first
        return None
    run.note_tracker()
    return run.retry(lambda: promote(config, run.folders, run.mlflow_id, drift, swapped))


def make_and_compare(run: Run) -> None:
    """Make every node in order, and compare what was measured."""
    run.make_all()
    run.show_comparison()


def check_drift(config: RefreshConfig, folders: Mapping[str, Path], asked: set[str]) -> tuple[Drift, Swapped]:
    """Swap the servers to the champion (one may have restarted with its old drafter), and judge the drift."""
    assert config.registry is not None and config.champion is not None
    swapped, display = swap_servers(config.registry), Display()
    if swapped[0]:
        display.line(swapped[0])
    drift = judge_drift(config, folders, asked)
    if drift.reasons:
        version, why = config.champion.version, "; ".join(drift.reasons)
        display.line(f"drift: the refresh continues, with version {version} as champion: {why}")
    return drift, swapped


def promote(
    config: RefreshConfig,
    folders: Mapping[str, Path],
    mlflow_id: str | None,
    drift: Drift | None = None,
    swapped: Swapped = NO_SERVERS,
) -> Conclusion:
    """Register the challenger as a version of its line, and promote it if gate, history and a person agree.

    folders: node -> folder. mlflow_id: the refresh's run. swapped: what happened to the servers at the drift check.
    """
    line, lines, gate = config.registry, registry(), GateDecision.read(folders["gate"])
    assert line is not None
    if line.champion is not None:
        gate = gate.with_version(line.champion.version)
    challenger = Artifact(folders[gate.challenger], read_manifest(folders[gate.challenger]))
    tags = tags_of(config, gate, folders)
    expected = expected_champion(line, gate, challenger)
    version = lines.register(line.name, challenger, tags, run_id=mlflow_id)
    if line.upload and not version.uploaded:
        lines.upload(version, challenger.path / DRAFTER_FOLDER, mlflow_id)
    link_version(Tracking(home(), config.experiment), version, challenger.manifest)

    def ends(name: str, message: str, error: DraftsmithError | None) -> Conclusion:
        tag_refreshed(version)
        servers = swap_servers(line) if name == "Promoted" else swapped
        drifted = drift.tags if drift is not None else {}
        return with_servers(conclusion_of(name, message, gate, version, drifted, error=error), servers)

    at = f"{version.line}@{version.number}"
    if not gate.promote:
        name = "Inconclusive" if gate.outcome == "inconclusive" else "Refused"
        error = RefusedError(f"{version} is not promoted: {gate.outcome}")  # the screen has the reason
        return ends(name, f"{version} is not promoted: {gate.sentence}", error)
    if (event := lines.rollback_event(version)) is not None:  # the same inputs have made it again
        message = (
            f"{version} is not promoted: {event.by} took it out of service at {event.at} ({event.why}), and its inputs "
            f"have not changed since. To serve it: `draftsmith promote {at}`"
        )
        return ends("Refused", message, RefusedError(message))
    if line.approve and CHAMPION not in version.aliases and not approved(at):
        message = f"{version} waits for approval (registry.approve). To promote it: `draftsmith promote {at}`"
        return ends("Waiting", message, RefusedError(message))
    move_alias(version, expected, gate, tags)
    return ends("Promoted", f"{version} is the champion: {gate.sentence}", None)


@flow(name="evaluate", flow_run_name="{config.name}", persist_result=False)
def evaluate(config: EvaluateConfig, force: Names = None, start: Names = None, until: Names = None) -> Any:
    """Compare drafters on held-out prompts, without training any; same arguments as `refresh`."""
    return Run.of(EVALUATE, config, force, start, until).do(make_and_compare)


@flow(name="diagnose", flow_run_name="{config.name}", persist_result=False)
def diagnose(config: DiagnoseConfig, force: Names = None, start: Names = None, until: Names = None) -> Any:
    """Check whether a running server drafts as replay does, and if not, why; same arguments as `refresh`."""
    return Run.of(DIAGNOSE, config, force, start, until).do(make_and_compare)


@flow(name="watch", flow_run_name="{config.name}", persist_result=False)
def watch(config: RefreshConfig, minutes: float = 5, then: str | None = None) -> Any:
    """Compare tau of a line's servers with the champion's at its promotion.

    Args:
        config: The line's refresh, which names the servers.
        minutes: How long to count finished requests, unless all servers trace theirs.
        then: If tau is measurably below: `rollback`, or a deployment to run, such as `refresh/my-model`.
    """
    redact_logs()
    bypass_proxy_for_localhost()  # a deployment's run does not come through the command
    if (line := config.registry) is None:
        raise DraftsmithError(f"{config.name}: names no model line to watch. Set registry.name.")
    outcome, sentence = watch_servers(line.name, line.servers, minutes, config.drift.threshold)
    conclusion = Conclusion(outcome.capitalize(), sentence)
    if outcome not in ("below", "mismatched"):
        return Completed(name=conclusion.name, message=conclusion.message)
    announce(config.name, conclusion)
    if outcome == "below" and then == "rollback":

        def body() -> str:
            rollback(Display(), line.name, sentence, dry_run=False, servers=line.servers)
            champion = registry().resolve(line.name)
            return "\n\n".join(
                [
                    f"{champion} is the champion again.",
                    *(f"{server.url}: {server.proof}" for server in served_by(champion)),
                ]
            )

        run_task("rollback", f"{line.name} rollback", body, Display().line)
    elif outcome == "below" and then is not None:
        # once a day, as a refresh may take longer than the time until the next watch
        once = f"watch of {then} {datetime.now(UTC).date()}"  # unique for a flow, which all lines share
        run_deployment(then, timeout=0, as_subflow=False, idempotency_key=once)
    return Failed(name=conclusion.name, message=conclusion.message)
