"""Reports the end of a run to Prefect: the verdict on the flow run's page, an event, a promotion as an asset."""

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
    """Show the verdict on the flow run's page, if the server is not a temporary one without pages."""
    if uses_temporary_server():
        return
    key = re.sub("[^a-z0-9]+", "-", f"{run} verdict".lower()).strip("-")
    try:
        create_markdown_artifact(markdown, key=key, description=f"The verdict on {run}.")
    except httpx.HTTPError as error:
        if not is_api_loss(error):
            raise
        say(f"warning: Prefect's server is lost ({type(error).__name__}), so the flow run's page lacks the verdict.")


def announce(run: str, conclusion: Conclusion) -> None:
    """Emit an event such as `draftsmith.promoted`, and materialise the asset of a promotion."""
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
    """Suspend a deployment's run until a person approves, then return True; return False for any other run.

    The process of a suspended run ends in this call. When a person resumes the run, another process plans again, comes
    back to this call and continues. A run without a deployment cannot be resumed.

    key: what is to be approved.
    """
    if not deployed():
        return False
    suspend_flow_run(key=key)
    return True


def deployed() -> bool:
    """Return whether the current flow run is one of a deployment."""
    run = _flow_run()
    return run is not None and run.deployment_id is not None


def resumed() -> bool:
    """Return whether the current flow run continues after it was suspended."""
    run = _flow_run()
    return run is not None and bool(run.empirical_policy.pause_keys)


def _flow_run() -> FlowRun | None:
    context = FlowRunContext.get()
    return context.flow_run if context is not None else None
