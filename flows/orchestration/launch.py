"""Runs a config's flow in this process, with a temporary Prefect server if there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import Display
from draftsmith.flows.execution.machine import check_home
from draftsmith.flows.execution.retry import with_retries
from draftsmith.flows.orchestration.server import start_prefect_server
from draftsmith.flows.planning.graph import Selection
from draftsmith.flows.planning.plan import Conclusion, Pipeline, load_attribute
from draftsmith.stages.runtime.memory import restore_gc


def launch(
    config: RunOptions,
    pipeline: Pipeline,
    display: Display,
    selection: Selection,
    lost: Callable[[], None] = lambda: None,
) -> tuple[Mapping[str, Path], Conclusion | None]:
    """Run the flow of a config, and return its artifacts by node and its conclusion, if it has one.

    lost: called if Prefect's server was lost before it knew how the run ended, which a line reports.

    Raises DraftsmithError for all failures. A drafter that is not promoted, or not served, is no failure.
    """
    tracking = Tracking(home(), config.experiment)
    check_home(home(), config)
    wait_for_server = start_prefect_server(home())
    with_retries(tracking.check, config.stages, display.line)  # while the server starts
    flow = load_attribute(pipeline.flow)
    with_retries(lambda: wait_for_server(display.line), config.stages, display.line)
    from draftsmith.flows.orchestration.flow_run import run_flow  # imports Prefect

    restore_gc()
    options = {name: list(getattr(selection, name)) for name in ("force", "start", "until")}

    def warn(what: str) -> None:
        display.line(f"warning: {what}")
        lost()

    ended = run_flow(flow, config, warn, **options)
    return open_store(home()).folders(ended.nodes), ended.conclusion
