"""The Prefect flows of refresh, evaluate and diagnose, for commands, deployments and schedules."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from prefect import flow
from prefect.deployments import run_deployment
from prefect.states import Completed, Failed

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.host import bypass_proxy_for_localhost
from draftsmith.artifacts.redaction import redact_logs
from draftsmith.flows.execution.display import Display
from draftsmith.flows.orchestration.flow_run import announce, run_task
from draftsmith.flows.orchestration.run import run_graph
from draftsmith.flows.planning.plan import Conclusion
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.graph import REFRESH
from draftsmith.flows.refresh.line import registry
from draftsmith.flows.refresh.measurements import DIAGNOSE, EVALUATE, DiagnoseConfig, EvaluateConfig
from draftsmith.flows.refresh.registry_commands import rollback
from draftsmith.flows.refresh.swap import served_by
from draftsmith.flows.refresh.watch import watch as watch_servers


@flow(name="refresh", flow_run_name="{config.name}", persist_result=False)
def refresh(
    config: RefreshConfig,
    force: list[str] | None = None,
    start: list[str] | None = None,
    until: list[str] | None = None,
) -> Any:
    """Keep a drafter matched to its target: rollout, SFT, mining, distillation, evaluation.

    Args:
        config: The run, as in a YAML file of `configs/`.
        force: Nodes to make again although the store has them.
        start: Nodes to start from; all nodes that do not follow from them must be in the store.
        until: Make only these nodes and what they need; nothing is promoted.
    """
    return run_graph(config, REFRESH, force, start, until)


@flow(name="evaluate", flow_run_name="{config.name}", persist_result=False)
def evaluate(
    config: EvaluateConfig,
    force: list[str] | None = None,
    start: list[str] | None = None,
    until: list[str] | None = None,
) -> Any:
    """Compare drafters on held-out prompts, without training any; arguments as of `refresh`."""
    return run_graph(config, EVALUATE, force, start, until)


@flow(name="diagnose", flow_run_name="{config.name}", persist_result=False)
def diagnose(
    config: DiagnoseConfig,
    force: list[str] | None = None,
    start: list[str] | None = None,
    until: list[str] | None = None,
) -> Any:
    """Check whether a running server drafts as replay does, and if not, why; arguments as of `refresh`."""
    return run_graph(config, DIAGNOSE, force, start, until)


@flow(name="watch", flow_run_name="{config.name}", persist_result=False)
def watch(config: RefreshConfig, minutes: float = 5, then: str | None = None) -> Any:
    """Compare tau of a line's servers with the champion's at its promotion.

    Args:
        config: The line's refresh, which names the servers.
        minutes: Unless all servers trace requests, count those that finish in so many minutes.
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
                [f"{champion} is the champion again.", *(f"{each.url}: {each.proof}" for each in served_by(champion))]
            )

        run_task("rollback", f"{line.name} rollback", body, Display().line)
    elif outcome == "below" and then is not None:
        # once a day, as a refresh may take longer than the time until the next watch
        once = f"watch of {then} {datetime.now(UTC).date()}"  # unique for a flow, which all lines share
        run_deployment(then, timeout=0, as_subflow=False, idempotency_key=once)
    return Failed(name=conclusion.name, message=conclusion.message)
