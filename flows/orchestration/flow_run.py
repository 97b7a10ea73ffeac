"""The current flow run in Prefect: its cancellation and approval, its tasks besides the nodes', and its end."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Self

import httpx
from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.assets import add_asset_metadata, materialize
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.flow_runs import suspend_flow_run
from prefect.utilities.urls import url_for

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.artifacts.tracking.terms import escape_markdown
from draftsmith.flows.orchestration.server import uses_temporary_server
from draftsmith.flows.planning.plan import Conclusion


def is_api_loss(error: BaseException) -> bool:
    """Return whether the error shows that Prefect's API is unreachable or broken."""
    if isinstance(error, httpx.HTTPStatusError):
        return error.response.status_code >= 500
    return isinstance(error, httpx.TransportError)


_POLL_S = 5.0


class CancelledError(StageInterrupted):
    """Raised when the run was cancelled in Prefect; the same command continues it."""


class Cancellation:
    """Polls Prefect's API in a thread for the cancellation of the current flow run."""

    def __init__(self) -> None:
        context = FlowRunContext.get()
        self._run: Any = context.flow_run.id if context is not None and context.flow_run is not None else None
        self._cancelled, self._closed = threading.Event(), threading.Event()

    def __enter__(self) -> Self:
        if self._run is not None:
            threading.Thread(target=self._watch, name="prefect-cancellation", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed.set()

    def check(self) -> None:
        """Raise `CancelledError` if the run was cancelled."""
        if self._cancelled.is_set():
            raise CancelledError("cancelled in Prefect. Run the same command again to continue from what was saved.")

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_S):
            with suppress(Exception), get_client(sync_client=True) as client:  # a lost API cancels nothing
                state = client.read_flow_run(self._run).state
                if state is not None and (state.is_cancelling() or state.is_cancelled()):
                    self._cancelled.set()
                    return


def show_verdict(run: str, markdown: str, say: Callable[[str], None]) -> None:
    """Show the verdict on the flow run's page, unless the server is a temporary one, which has no pages."""
    _show_on_page(f"{run} verdict", f"The verdict on {run}.", markdown, say)


def _show_on_page(name: str, description: str, markdown: str, say: Callable[[str], None]) -> None:
    if uses_temporary_server():
        return
    key = re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")
    try:
        create_markdown_artifact(markdown, key=key, description=description)
    except httpx.HTTPError as error:
        if not is_api_loss(error):
            raise
        say(f"warning: Prefect's server is lost ({type(error).__name__}), so the flow run's page lacks: {description}")


def run_task(name: str, title: str, body: Callable[[], str], say: Callable[[str], None]) -> str:
    """Run the body as a task of the current flow run. The task's artifact has the returned text or the error."""
    if FlowRunContext.get() is None:
        return body()
    show = partial(_show_on_page, title, f"The {name} of this run.", say=say)
    try:
        text = task(name=name, task_run_name=title, cache_policy=NO_CACHE, persist_result=False)(body)()
    except DraftsmithError as error:
        show(escape_markdown(f"{name} failed: {error}"))
        raise
    show(escape_markdown(text))
    return text


def announce(run: str, conclusion: Conclusion) -> None:
    """Emit an event such as `draftsmith.promoted`, and materialise the asset of a promotion."""
    emit_event(
        event=f"draftsmith.{conclusion.name.lower()}",
        resource={"prefect.resource.id": f"draftsmith.run.{run}", "prefect.resource.name": run},
        payload={"message": conclusion.message, "metrics": dict(conclusion.metrics), "tags": dict(conclusion.tags)},
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

    key: name of what is to be approved, such as a version.
    """
    if not deployed():
        return False
    suspend_flow_run(key=key)
    return True


def deployed() -> bool:
    """Return whether the current flow run belongs to a deployment."""
    run = _flow_run()
    return run is not None and run.deployment_id is not None


def page_url() -> str | None:
    """Return the address of the current flow run's page; None on a temporary server, which has no pages."""
    run = _flow_run()
    return url_for(run) if run is not None and not uses_temporary_server() else None


def resumed() -> bool:
    """Return whether the current flow run continues after it was suspended."""
    run = _flow_run()
    return run is not None and bool(run.empirical_policy.pause_keys)


def _flow_run() -> FlowRun | None:
    context = FlowRunContext.get()
    return context.flow_run if context is not None else None
