"""What Prefect shows of a run's end: the verdict on the flow run's page, an event, a promotion as an asset."""

from __future__ import annotations

import re
from collections.abc import Callable

import httpx
from prefect.artifacts import create_markdown_artifact
from prefect.assets import add_asset_metadata, materialize
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.flow_runs import suspend_flow_run

from draftsmith.flows.orchestration.flow_lifecycle import is_api_loss
from draftsmith.flows.orchestration.server import uses_temporary_server
from draftsmith.flows.planning.graph import Conclusion


def show_verdict(run: str, markdown: str, say: Callable[[str], None]) -> None:
    """Put the verdict on the page of the flow run. A temporary server has no pages."""
    if uses_temporary_server():
        return
    key = re.sub("[^a-z0-9]+", "-", f"{run} verdict".lower()).strip("-")
    try:
        create_markdown_artifact(markdown, key=key, description=f"The verdict on {run}.")
    except httpx.HTTPError as error:
        if not is_api_loss(error):
            raise
        say(f"warning: Prefect's server is lost ({type(error).__name__}). The flow run's page lacks the verdict.")


def announce(run: str, conclusion: Conclusion) -> None:
    """Emit an event such as `draftsmith.promoted`, and materialise the asset that the conclusion names."""
    emit_event(
        event=f"draftsmith.{conclusion.name.lower()}",
        resource={"prefect.resource.id": f"draftsmith.run.{run}", "prefect.resource.name": run},
        payload={"message": conclusion.message, "figures": dict(conclusion.metrics), "tags": dict(conclusion.tags)},
    )
    if conclusion.asset:

        @materialize(
            conclusion.asset,
            by="draftsmith",
            name="promotion",
            task_run_name="promotion",
            cache_policy=NO_CACHE,
            persist_result=False,
        )
        def promotion() -> None:
            add_asset_metadata(conclusion.asset, dict(conclusion.metadata))

        promotion()


def approved(key: str) -> bool:
    """Return whether a person has said yes to what `key` names, after asking; False if nobody can be asked here.

    A run of a deployment is suspended: its process ends in here. When a person resumes the run, another process makes
    the same plan, comes here again and goes on. A run without a deployment cannot be resumed.
    """
    if not deployed():
        return False
    suspend_flow_run(key=key)
    return True


def deployed() -> bool:
    """Return whether a deployment runs it: on a schedule, or because somebody asks for one more of its runs."""
    run = _flow_run()
    return run is not None and run.deployment_id is not None


def resumed() -> bool:
    """Return whether this flow run goes on after it was suspended."""
    run = _flow_run()
    return run is not None and bool(run.empirical_policy.pause_keys)


def _flow_run() -> FlowRun | None:
    context = FlowRunContext.get()
    return context.flow_run if context is not None else None
