"""A config as a deployment of Prefect: its schedule, its work pool, and the config as the form of a run."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.automations import AutomationCore
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType, WorkPool
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import EntrypointType, RunnerDeployment
from prefect.events.actions import CallWebhook, ChangeFlowRunState
from prefect.events.schemas.automations import EventTrigger, Posture
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from pydantic import ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.planning.graph import Pipeline

HEARTBEAT_S = 30  # of flow runs, so that a host that is lost is noticed
_ENVIRONMENT = {
    "PREFECT_LOGGING_EXTRA_LOGGERS": "draftsmith",  # the stages' lines appear in the flow run
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_S),
    "DO_NOT_TRACK": "1",
}


@dataclass(frozen=True)
class DeploymentInfo:
    """A deployment as the server knows it."""

    name: str  # FLOW/NAME
    url: str
    created: bool  # else it was there, and is changed
    webhook: bool  # whether one is called: the one that was given, or that it has kept


@dataclass(frozen=True)
class Schedule:
    """When it runs by itself. None: only when asked to."""

    cron: str | None = None
    timezone: str = "UTC"

    def checked(self) -> list[CronSchedule]:
        """Raises DraftsmithError for what no schedule is."""
        if self.cron is None:
            return []
        try:
            return [CronSchedule(cron=self.cron, timezone=self.timezone)]
        except ValidationError as error:
            raise DraftsmithError(
                f"--cron {self.cron!r} --timezone {self.timezone}: {error.errors()[0]['msg']}: five fields such as "
                "'0 3 * * 1' (Mondays at 3), and a name such as Europe/Berlin"
            ) from None


def deploy(
    config: RunOptions,
    pipeline: Pipeline,
    api: str,
    *,
    pool: str,
    schedule: Schedule = Schedule(),
    force: Sequence[str] = (),
    webhook: str | None = None,
    silent_days: float | None = None,
    folder: Path,
) -> DeploymentInfo:
    """Create the deployment of the config's flow under the config's name, or change it if it is there.

    api: URL of Prefect's server. pool: a work pool that exists. force: nodes that every run makes again, such as
    `target`. webhook: called when a run ends or waits (`pipeline.automations`); None leaves the one that the deployment
    has. silent_days: the webhook is called too when no run has ended for so long. folder: what relative paths in the
    config are relative to; where runs of a process pool work. Raises DraftsmithError, also for a deployment of this
    name that is of another line of drafters.
    """
    crons = schedule.checked()
    if webhook is not None:
        check_address(webhook)
    elif silent_days is not None:
        raise DraftsmithError("--silent-after: nobody would be called. Pass --webhook too.")
    with get_client(sync_client=True) as client:
        found = _pool(client, pool)
        module, _, attribute = pipeline.flow.partition(":")
        flow: Flow[..., Any] = getattr(importlib.import_module(module), attribute)
        deployment = RunnerDeployment.from_flow(
            flow,
            name=config.name.replace("/", "-"),
            schedules=crons,
            parameters=parameters(config, force),
            concurrency_limit=1,
            job_variables=_job_variables(found, folder),
            entrypoint_type=EntrypointType.MODULE_PATH,  # wherever Draftsmith is installed
        )
        created = _is_new(client, deployment.full_name, config)
        made = deployment.apply(work_pool_name=pool)
        assert isinstance(made, UUID)
        if webhook is not None:
            call_webhook(client, webhook, made, deployment.name, heartbeat_s=HEARTBEAT_S, silent_days=silent_days)
        told = has_webhook(client, deployment.name)
    ui = api.rstrip("/").removesuffix("/api")
    return DeploymentInfo(deployment.full_name, f"{ui}/deployments/deployment/{made}", created, told)


def parameters(config: RunOptions, force: Sequence[str]) -> dict[str, Any]:
    """Return the flow's parameters: what the file says, and no more; the rest are defaults, which the form shows."""
    return {"config": config.model_dump(mode="json", exclude_unset=True), "force": list(force)}


def _is_new(client: SyncPrefectClient, name: str, config: RunOptions) -> bool:
    """Whether there is no deployment of this name (FLOW/NAME). Raises DraftsmithError for one of another line: it would
    be lost to a copied file that kept its name."""
    try:
        known = client.read_deployment_by_name(name)
    except ObjectNotFound:
        return True
    registered = (known.parameters.get("config") or {}).get("registry") or {}
    line, own = registered.get("name"), config.experiment
    if line and own and line != own:
        raise DraftsmithError(
            f"name: the deployment {name} is of the line {line}, and this config is of {own}: give it another name, or "
            f"take that one away first with `prefect deployment delete {name}`"
        )
    return False


def _pool(client: SyncPrefectClient, name: str) -> WorkPool:
    try:
        return client.read_work_pool(name)
    except ObjectNotFound:
        raise DraftsmithError(
            f"--pool {name}: the server has no such work pool: make it with `prefect work-pool create {name} --type "
            "process`; templates for other types are in configs/team"
        ) from None


def _job_variables(pool: WorkPool, folder: Path) -> dict[str, Any]:
    """A process works in the folder that it was deployed from; a container or a cluster's job has its own."""
    if pool.type != "process":
        return {"env": _ENVIRONMENT}
    path = {"PYTHONPATH": os.environ["PYTHONPATH"]} if os.environ.get("PYTHONPATH") else {}
    return {"working_dir": str(folder), "env": {**_ENVIRONMENT, **path}}


_LOST = "its host or its process sends nothing more"
_MISSED = 4  # heartbeats in a row, then a run is taken for crashed
# Our own events say what a run came to: the states' events wait for those before them, which a schedule's runs lack.
_OURS = {f"draftsmith.{outcome}" for outcome in ("promoted", "refused", "inconclusive")}
_CALLED = {f"prefect.flow-run.{state}" for state in ("Failed", "TimedOut", "Crashed", "Suspended")} | _OURS
_ENDED = {"draftsmith.current", "prefect.flow-run.Completed", "prefect.flow-run.Suspended"} | _OURS
# JSON whatever the message holds. The run may be in another state by now: the event says which one it came to.
_PAYLOAD = """{"cause": {{ event.event.split(".")[-1] | lower | tojson }}, "deployment": {{ deployment.name | tojson }},
 "flow_run": {{ flow_run.name | tojson }},
 "message": {{ (event.payload.message or event.payload.get("validated_state", {}).message or "") | tojson }},
 "url": {{ flow_run | ui_url | tojson }}}"""


def check_address(url: str) -> None:
    """Raise DraftsmithError for what nothing could be sent to."""
    if not re.match(r"https?://[^/\s]", url):
        raise DraftsmithError(
            f"--webhook {url!r}: an address begins with https:// or http:// and a host, such as "
            "https://hooks.example/draftsmith"
        )


def has_webhook(client: SyncPrefectClient, name: str) -> bool:
    """Return whether `call_webhook` was called for the deployment of this name."""
    return bool(client.read_automations_by_name(f"{name}: webhook"))


def call_webhook(
    client: SyncPrefectClient, url: str, deployment: UUID, name: str, *, heartbeat_s: float, silent_days: float | None
) -> None:
    """Create or change the automations of a deployment. The URL is kept in a block, encrypted.

    silent_days: the URL is called too when no run has ended for so long. A run that sends no heartbeats is called
    crashed, as its host or its process is gone.
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
        known = client.read_automations_by_name(automation.name)
        if known:
            client.update_automation(known[0].id, automation)
        else:
            client.create_automation(automation)
