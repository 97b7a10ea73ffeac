"""Runs a config's flow in this process, with a temporary Prefect server if there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from draftsmith.artifacts.errors import RetryableError
from draftsmith.artifacts.home import home
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.machine import check_home
from draftsmith.flows.orchestration.server import prefect_server
from draftsmith.flows.planning.graph import Selection
from draftsmith.flows.planning.plan import Pipeline, load_attribute
from draftsmith.stages.runtime.memory import restore_gc

if TYPE_CHECKING:
    from draftsmith.flows.orchestration.run import Run


def launch(
    config: RunOptions, pipeline: Pipeline, selection: Selection, lost: Callable[[], None] = lambda: None
) -> Run:
    """Plan a run of a config while Prefect's server starts, print the plan, and run the config's flow.

    lost: called if Prefect's server was lost before it knew how the run ended, which a line reports.

    Raises DraftsmithError for all failures. A drafter that is not promoted, or not served, is no failure.
    """
    check_home(home(), config)
    with prefect_server(home()) as wait_for_server:
        from draftsmith.flows.orchestration.run import Run  # imports Prefect, which reads the server's environment

        run = Run(pipeline, config, selection)
        run.prepare()
        run.display.plan(run.plan, run.end)
        flow = load_attribute(pipeline.flow)
        run.retry(lambda: wait_for_server(run.display.line))
    restore_gc()

    def warn(what: str) -> None:
        run.display.line(f"warning: {what}")
        lost()

    with flow_of(run, warn):
        flow(run.config, **{name: list(getattr(selection, name)) for name in ("force", "start", "until")})
    return run


@contextmanager
def flow_of(run: Run, lost: Callable[[str], None]) -> Iterator[None]:
    """Give a prepared run to the flow that the body calls. Raises the error of the flow's own body.

    The conclusion's error stays in the run. lost: called with a sentence if Prefect's API was lost before it knew how
    the run ended.

    Raises RetryableError if the API was lost before the flow's body started, or for so long that it could not continue.
    """
    from draftsmith.flows.orchestration.flow_run import is_api_loss  # imports Prefect
    from draftsmith.flows.orchestration.run import CURRENT

    token = CURRENT.set(run)
    try:
        yield
    except (KeyboardInterrupt, SystemExit) as stop:
        if run.error is not stop:  # Prefect ends a terminated run with its own error, and this one follows
            for note in getattr(run.error, "__notes__", ()):
                stop.add_note(note)
        raise
    except BaseException as error:
        if not run.ended:
            if not is_api_loss(error):
                raise
            raise RetryableError(
                f"Prefect's API was lost before the run started ({_describe(error)}). Run the same command again."
            ) from error
        if run.error is not None and run.error is not error and is_api_loss(error):
            lost(f"Prefect does not know how the run ended ({_describe(error)})")
        elif run.error is None:
            lost(f"Prefect does not know that the run succeeded ({_describe(error)}). Its artifacts are complete")
    finally:
        CURRENT.reset(token)
    if run.error is not None and is_api_loss(run.error):
        raise RetryableError(
            f"Prefect's API was lost during the run ({_describe(run.error)}). Start its server again, then run the "
            "same command, which reuses what is finished."
        ) from run.error
    if run.error is not None and (run.conclusion is None or run.error is not run.conclusion.error):
        raise run.error


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
