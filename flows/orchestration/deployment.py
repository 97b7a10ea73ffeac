"""Creates a Prefect deployment of a config: schedule, work pool, parameters and webhook."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.automations import AutomationCore
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType, WorkPool
from prefect.client.schemas.schedules import CronSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.utilities.urls import url_for
from pydantic import ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.manifest import local_time
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.planning.graph import Pipeline, load_attribute

HEARTBEAT_S = 30  # of flow runs, so that a lost host is noticed
_ENVIRONMENT = {
    "PREFECT_LOGGING_EXTRA_LOGGERS": "draftsmith",  # shows the stages' lines in the flow run
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",  # the worker's log has the stages' lines as they are printed
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True)
class DeploymentOptions:
    """How and when the runs of a deployment start, and who is called about them."""

    pool: str  # a work pool that exists
    folder: Path  # the working directory of a process pool's runs, to which paths in the config are relative
    schedules: Sequence[CronSchedule]  # none: only on request
    arguments: Mapping[str, Any]  # of the flow, beside the config
    webhook: str | None  # called when a run ends or waits; None keeps the deployment's earlier one
    silent_days: float | None  # the webhook is also called if no run has ended for so long


def schedules_of(cron: str | None, timezone: str) -> list[CronSchedule]:
    """Return the schedule of a deployment, if it has one. Raises DraftsmithError if it is not valid."""
    try:
        return [] if cron is None else [CronSchedule(cron=cron, timezone=timezone)]
    except ValidationError as error:
        raise DraftsmithError(
            f"--cron {cron!r} --timezone {timezone}: {error.errors()[0]['msg']}. Give five fields such as '0 3 * * 1' "
            "(Mondays at 3), and a name such as Europe/Berlin."
        ) from None


def deploy(config: RunOptions, pipeline: Pipeline, api: str, options: DeploymentOptions) -> str:
    """Create or change the deployment of the config's flow, under the config's name. Return what was done.

    api: URL of Prefect's server.

    Raises DraftsmithError, also if a deployment of this name belongs to another line.
    """
    if options.webhook is not None:
        check_address(options.webhook)
    elif options.silent_days is not None:
        raise DraftsmithError("--silent-after: nobody would be called. Pass --webhook too.")
    with get_client(sync_client=True) as client:
        pool = _pool(client, options.pool)
        flow: Flow[..., Any] = load_attribute(pipeline.flow)
        deployment = RunnerDeployment.from_flow(
            flow,
            name=config.name.replace("/", "-"),
            schedules=list(options.schedules),
            parameters=parameters(config, options.arguments),
            concurrency_limit=1,
            job_variables=_job_variables(pool, options.folder),
            entrypoint_type=EntrypointType.MODULE_PATH,  # found wherever Draftsmith is installed
        )
        created = _is_new(client, deployment.full_name, config)
        id_ = deployment.apply(work_pool_name=options.pool)
        assert isinstance(id_, UUID)
        if options.webhook is not None:
            name, silent_days = deployment.name, options.silent_days
            set_webhook(client, options.webhook, id_, name, heartbeat_s=HEARTBEAT_S, silent_days=silent_days)
        webhook = "with its webhook" if options.webhook is not None else "without a webhook"
        if options.webhook is None and client.read_automations_by_name(f"{deployment.name}: webhook"):
            webhook = "with its earlier webhook"
    when = ", ".join(f"{each.cron} ({each.timezone})" for each in options.schedules) or "on request"
    page = f"{api.rstrip('/').removesuffix('/api')}/deployments/deployment/{id_}"
    action = "created" if created else "changed"
    return f"{deployment.full_name}: {action}, in work pool {options.pool}, {when}, {webhook}: {page}"


def parameters(config: RunOptions, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flow's parameters: only the fields that the config sets, as the form shows defaults."""
    return {"config": config.model_dump(mode="json", exclude_unset=True), **arguments}


def runs_of_line(line: str) -> list[str]:
    """Return of each deployment of a line when it runs next, and its last run if that did not complete."""
    found = []
    with get_client(sync_client=True) as client:
        for deployment in client.read_deployments(limit=200):
            config = deployment.parameters.get("config")
            if not isinstance(config, dict) or (config.get("registry") or {}).get("name") != line:
                continue
            own = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
            scheduled = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
            begun = FlowRunFilter(start_time=FlowRunFilterStartTime(is_null_=False))
            soonest, latest = FlowRunSort.EXPECTED_START_TIME_ASC, FlowRunSort.START_TIME_DESC
            coming = client.read_flow_runs(flow_run_filter=scheduled, deployment_filter=own, sort=soonest, limit=1)
            last = client.read_flow_runs(flow_run_filter=begun, deployment_filter=own, sort=latest, limit=1)
            when = next((local_time(str(run.expected_start_time)) for run in coming), "on request")
            text = f"{when}, deployment {deployment.name}"
            for run in last:
                if run.state is not None and not run.state.is_completed():
                    text += f" (its last run: {run.state.name}, {url_for(run)})"
            found.append(text)
    return found


def _is_new(client: SyncPrefectClient, name: str, config: RunOptions) -> bool:
    """Return whether there is no deployment of this name (FLOW/NAME).

    Raises DraftsmithError if it is one of another line, which a copied file with an unchanged name would replace.
    """
    try:
        deployment = client.read_deployment_by_name(name)
    except ObjectNotFound:
        return True
    registered = (deployment.parameters.get("config") or {}).get("registry") or {}
    its_line, line = registered.get("name"), config.experiment
    if its_line and line and its_line != line:
        raise DraftsmithError(
            f"name: the deployment {name} is of line {its_line}, and this config is of {line}. Give it another name, "
            f"or delete that one with `prefect deployment delete {name}`."
        )
    return False


def _pool(client: SyncPrefectClient, name: str) -> WorkPool:
    try:
        return client.read_work_pool(name)
    except ObjectNotFound:
        raise DraftsmithError(
            f"--pool {name}: the server has no such work pool. Create it with `prefect work-pool create {name} --type "
            "process`; templates for other types are in configs/team."
        ) from None


def _job_variables(pool: WorkPool, folder: Path) -> dict[str, object]:
    """Return the variables of a run's job. A process works in `folder`; containers and cluster jobs have their own."""
    if pool.type != "process":
        return {"env": _ENVIRONMENT}
    path = {"PYTHONPATH": os.environ["PYTHONPATH"]} if os.environ.get("PYTHONPATH") else {}
    return {"working_dir": str(folder), "env": {**_ENVIRONMENT, **path}}


_LOST = "its host or its process sends no more heartbeats"
_MISSED = 4  # heartbeats in a row, after which a run has crashed
# A run's outcome comes from our own events. Prefect's events of states wait for the ones before them, which scheduled
# runs lack.
_OUTCOMES = ("promoted", "unserved", "refused", "inconclusive", "below", "mismatched")
_OURS = {f"draftsmith.{outcome}" for outcome in _OUTCOMES}
_CALLED = {f"prefect.flow-run.{state}" for state in ("Failed", "TimedOut", "Crashed", "Suspended")} | _OURS
_QUIET = ("Completed", "Suspended", "Promised", "Inconclusive")  # states; the last two are a watch's
_ENDED = {"draftsmith.current", *(f"prefect.flow-run.{state}" for state in _QUIET)} | _OURS
# Valid JSON whatever the message is. The state is the event's, since the run may have another one by now.
_PAYLOAD = """{"cause": {{ event.event.split(".")[-1] | lower | tojson }}, "deployment": {{ deployment.name | tojson }},
 "flow_run": {{ flow_run.name | tojson }},
 "message": {{ (event.payload.message or event.payload.get("validated_state", {}).message or "") | tojson }},
 "url": {{ flow_run | ui_url | tojson }}}"""


def check_address(url: str) -> None:
    """Raise DraftsmithError if the text is no address of an HTTP server."""
    if not re.match(r"https?://[^/\s]", url):
        raise DraftsmithError(
            f"--webhook {url!r}: not an address. Give one with https:// or http:// and a host, such as "
            "https://hooks.example/draftsmith."
        )


def set_webhook(
    client: SyncPrefectClient, url: str, deployment: UUID, name: str, *, heartbeat_s: float, silent_days: float | None
) -> None:
    """Create or change the automations that call a deployment's webhook. A block keeps the URL encrypted.

    They also set a run without heartbeats to crashed, since its host or its process is gone.

    silent_days: the URL is also called if no run has ended for so long.
    """
    block = Webhook.model_validate({"url": url, "headers": {"Content-Type": "application/json"}})
    document = block.save(f"draftsmith-{deployment}", overwrite=True)
    assert isinstance(document, UUID)
    related: dict[str, str | list[str]] = {
        "prefect.resource.role": "deployment",
        "prefect.resource.id": f"prefect.deployment.{deployment}",
    }
    wanted = [
        AutomationCore(
            name=f"{name}: webhook",
            description=f"Calls the webhook of deployment {name}.",
            trigger=EventTrigger(
                expect=_CALLED, match_related=related, posture=Posture.Reactive, threshold=1, within=timedelta(0)
            ),
            actions=[CallWebhook(block_document_id=document, payload=_PAYLOAD)],
        ),
        AutomationCore(
            name=f"{name}: lost",
            description="A run that sends no heartbeat has crashed: its host or its process is gone.",
            trigger=EventTrigger(
                after={"prefect.flow-run.heartbeat"},
                expect={"prefect.flow-run.*"},
                match={"prefect.resource.id": "prefect.flow-run.*"},
                match_related=related,
                for_each={"prefect.resource.id"},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(seconds=_MISSED * heartbeat_s),
            ),
            actions=[ChangeFlowRunState(name="Crashed", state=StateType.CRASHED, message=_LOST, force=False)],
        ),
    ]
    if silent_days is not None:
        message = f"no run has ended for {silent_days:g} days"
        payload = json.dumps({"cause": "silent", "deployment": name, "message": message})
        wanted.append(
            AutomationCore(
                name=f"{name}: silent",
                description=f"Calls the webhook of deployment {name} when no run has ended for {silent_days:g} days.",
                trigger=EventTrigger(
                    expect=_ENDED,
                    match_related=related,
                    posture=Posture.Proactive,
                    threshold=1,
                    within=timedelta(days=silent_days),
                ),
                actions=[CallWebhook(block_document_id=document, payload=payload)],
            )
        )
    for automation in wanted:
        if existing := client.read_automations_by_name(automation.name):
            client.update_automation(existing[0].id, automation)
        else:
            client.create_automation(automation)
