"""Creates a Prefect deployment of a config: schedule, work pool and parameters."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
from prefect.exceptions import ObjectNotFound
from prefect.flows import Flow
from prefect.utilities.urls import url_for
from pydantic import ValidationError

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.store.manifest import local_time
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.planning.plan import Pipeline, load_attribute

_ENVIRONMENT = {
    "PREFECT_LOGGING_EXTRA_LOGGERS": "draftsmith",  # shows the stages' lines in the flow run
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "WARNING",  # the worker's log has the stages' lines as they are printed
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",  # seconds; an automation notices a lost host by it
    "DO_NOT_TRACK": "1",
}


def schedules_of(cron: str | None, timezone: str) -> list[CronSchedule]:
    """Return the schedule of a deployment, if it has one. Raises DraftsmithError if it is not valid."""
    try:
        return [] if cron is None else [CronSchedule(cron=cron, timezone=timezone)]
    except ValidationError as error:
        raise DraftsmithError(
            f"--cron {cron!r} --timezone {timezone}: {error.errors()[0]['msg']}. Give five fields such as '0 3 * * 1' "
            "(Mondays at 3), and a name such as Europe/Berlin."
        ) from None


def deploy(
    config: RunOptions,
    pipeline: Pipeline,
    api: str,
    *,
    pool: str,
    folder: Path,
    schedules: Sequence[CronSchedule],
    arguments: Mapping[str, Any],
) -> str:
    """Create or change the deployment of the config's flow, under the config's name. Return what was done.

    api: URL of Prefect's server. pool: a work pool that exists. folder: the working directory of a process pool's runs,
    to which paths in the config are relative. schedules: empty: runs start only on request. arguments: arguments of the
    flow, without the config.

    Raises DraftsmithError, even if a deployment of this name belongs to another line.
    """
    with get_client(sync_client=True) as client:
        work_pool = _pool(client, pool)
        flow: Flow[..., Any] = load_attribute(pipeline.flow)
        deployment = RunnerDeployment.from_flow(
            flow,
            name=config.name.replace("/", "-"),
            schedules=list(schedules),
            parameters=parameters(config, arguments),
            concurrency_limit=1,
            job_variables=_job_variables(work_pool, folder),
            entrypoint_type=EntrypointType.MODULE_PATH,  # found wherever Draftsmith is installed
        )
        created = _is_new(client, deployment.full_name, config)
        id_ = deployment.apply(work_pool_name=pool)
    when = ", ".join(f"{schedule.cron} ({schedule.timezone})" for schedule in schedules) or "on request"
    page = f"{api.rstrip('/').removesuffix('/api')}/deployments/deployment/{id_}"
    action = "created" if created else "changed"
    return f"{deployment.full_name}: {action}, in work pool {pool}, {when}: {page}"


def parameters(config: RunOptions, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the flow's parameters: only the fields that the config sets, as the form shows defaults."""
    return {"config": config.model_dump(mode="json", exclude_unset=True), **arguments}


def runs_of_line(line: str) -> list[str]:
    """Return for each deployment of a line when it runs next, and its last run if that did not complete."""
    runs = []
    with get_client(sync_client=True) as client:
        for deployment in client.read_deployments(limit=200):
            config = deployment.parameters.get("config")
            if not isinstance(config, dict) or (config.get("registry") or {}).get("name") != line:
                continue
            filter_ = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
            scheduled = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
            begun = FlowRunFilter(start_time=FlowRunFilterStartTime(is_null_=False))
            soonest, latest = FlowRunSort.EXPECTED_START_TIME_ASC, FlowRunSort.START_TIME_DESC
            coming = client.read_flow_runs(flow_run_filter=scheduled, deployment_filter=filter_, sort=soonest, limit=1)
            last = client.read_flow_runs(flow_run_filter=begun, deployment_filter=filter_, sort=latest, limit=1)
            when = next((local_time(str(run.expected_start_time)) for run in coming), "on request")
            text = f"{when}, deployment {deployment.name}"
            for run in last:
                if run.state is not None and not run.state.is_completed():
                    text += f" (its last run: {run.state.name}, {url_for(run)})"
            runs.append(text)
    return runs


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
            f"name: the deployment {name} is of line {its_line}, and this config is of {line}. Choose another name, or "
            f"delete the deployment with `prefect deployment delete {name}`."
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
