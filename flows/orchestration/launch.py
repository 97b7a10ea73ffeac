"""Runs a config's flow in this process, with a temporary Prefect server if there is none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import Display
from draftsmith.flows.execution.machine import check_home
from draftsmith.flows.execution.node import ArtifactFolders
from draftsmith.flows.execution.retry import with_retries
from draftsmith.flows.orchestration.server import PrefectServer, start_prefect_server
from draftsmith.flows.planning.graph import Pipeline, Selection, load_attribute
from draftsmith.stages.runtime.memory import restore_gc


@dataclass(frozen=True)
class FinishedRun:
    """A run that has ended, with all its stages."""

    artifacts: ArtifactFolders  # by node
    outcome: str | None  # promoted, refused, inconclusive, waiting, current or unserved; None: no conclusion
    message: str  # the outcome with its reason
    refusal: DraftsmithError | None  # if a drafter was not promoted, or servers do not serve the champion


def launch(
    config: RunOptions,
    pipeline: Pipeline,
    display: Display,
    lost: Callable[[PrefectServer, str], None],
    selection: Selection,
) -> FinishedRun:
    """Run the flow of a config, as `draftsmith run` and `draftsmith.refresh` do.

    lost: called if Prefect's server was lost before it knew how the run ended.

    Raises DraftsmithError for all failures. A drafter that is not promoted, or not served, is no failure.
    """
    tracking = Tracking(home(), config.experiment)
    check_home(home(), config)
    server = start_prefect_server(home())
    with_retries(tracking.check, config.stages, display.line)  # while the server starts
    flow = load_attribute(pipeline.flow)
    with_retries(lambda: server.wait(display.line), config.stages, display.line)
    from draftsmith.flows.orchestration.flow_run import run_flow  # imports Prefect

    restore_gc()
    options = {name: list(getattr(selection, name)) for name in ("force", "start", "until")}
    ended = run_flow(flow, config, lambda what: lost(server, what), **options)
    refs = {name: node.ref for name, node in ended.nodes.items()}
    artifacts = ArtifactFolders(open_store(home()), refs)
    if (conclusion := ended.conclusion) is None:
        return FinishedRun(artifacts, None, "", None)
    return FinishedRun(artifacts, conclusion.name.lower(), conclusion.message, conclusion.error)
