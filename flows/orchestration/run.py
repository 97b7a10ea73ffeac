"""The body of a flow: checks, then a task a node, in order, followed by MLflow."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from prefect.exceptions import Pause
from prefect.states import Cancelled, Completed, Failed

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted, one_line
from draftsmith.artifacts.home import home
from draftsmith.artifacts.host import reach_ourselves_directly
from draftsmith.artifacts.redaction import redact_logs, redacted
from draftsmith.artifacts.store.manifest import ArtifactRef
from draftsmith.artifacts.store.retention import in_use
from draftsmith.artifacts.tracking import registry_homes as registered
from draftsmith.artifacts.tracking.models import log_models
from draftsmith.artifacts.tracking.refresh_runs import OUTCOME, close_dead_runs, misplaced
from draftsmith.artifacts.tracking.runs import NOTE, Tracking
from draftsmith.artifacts.tracking.terms import Status
from draftsmith.flows.config.options import RunOptions, check_runner
from draftsmith.flows.execution.display import Display
from draftsmith.flows.execution.machine import check_home
from draftsmith.flows.execution.mlflow_run import RunRecord
from draftsmith.flows.execution.node import Made, Workshop
from draftsmith.flows.execution.results import Folders, Refs
from draftsmith.flows.execution.retry import patiently
from draftsmith.flows.orchestration.announcements import announce, deployed, resumed, show_verdict
from draftsmith.flows.orchestration.flow_lifecycle import Cancellation, CancelledError, body
from draftsmith.flows.orchestration.task import run_node
from draftsmith.flows.planning.graph import (
    Checks,
    Conclusion,
    Course,
    Node,
    Pipeline,
    RunReview,
    forced_nodes,
    resolved,
)
from draftsmith.flows.planning.inputs import forget, held, hold
from draftsmith.flows.planning.selection import Part
from draftsmith.stages.runtime.stage import SOURCES


def run_graph(
    config: RunOptions,
    pipeline: Pipeline,
    force: Collection[str] | None = None,
    start: Collection[str] | None = None,
    until: Collection[str] | None = None,
) -> State[Any] | dict[str, Any]:
    """Body of a flow: make every node of the config's graph, or of a part of it (`pipeline.part`), which concludes
    nothing where nodes were left out. Returns what each node's artifact is, by node, or the flow's state with that as
    its data where the run came to a conclusion or was cancelled.

    Raises the first `DraftsmithError`; whatever was finished before is in the store. A conclusion is an event too, such
    as `draftsmith.promoted`, with the flow run and its deployment as related resources.
    """
    conclusion: Conclusion | None = None
    try:
        with body() as said, Cancellation() as cancellation, _reading(config, cancellation):
            made, conclusion = _run(config, pipeline, force or (), Part.of(start, until), cancellation)
            said.made = made
            if conclusion is not None:
                said.outcome, said.message = conclusion.name.lower(), conclusion.message
                announce(config.name, conclusion)
                if conclusion.error is not None:
                    raise conclusion.error
    except CancelledError as error:
        return Cancelled(message=str(error))
    except DraftsmithError as error:
        if conclusion is None or error is not conclusion.error:
            raise
        # a state of its own name: a refusal is no failure of the run, and automations tell the two apart
        return Failed(name=conclusion.name, message=conclusion.message, data=error)
    return made if conclusion is None else Completed(name=conclusion.name, message=conclusion.message, data=made)


def _reading(config: RunOptions, cancellation: Cancellation) -> AbstractContextManager[None]:
    limit_s = 60 * config.stages.lock_wait_minutes
    return in_use(home(), config.name, Display().line, limit_s=limit_s, check=cancellation.check)


def _run(
    config: RunOptions, pipeline: Pipeline, force: Collection[str], part: Part, cancellation: Cancellation
) -> tuple[dict[str, dict[str, Any]], Conclusion | None]:
    display = Display()
    config = patiently(lambda: resolved(config, pipeline), config.stages, display.line)
    redact_logs()
    reach_ourselves_directly()  # a deployment's run comes from no command
    logging.getLogger("draftsmith").setLevel(logging.INFO)  # without it Prefect does not show the stages' lines
    tracking = Tracking(home(), config.experiment)
    workshop = Workshop(home(), config, pipeline, display, tracking, check=cancellation.check)
    check_home(workshop.home, config)
    check_runner(config.stages)
    for check in (workshop.store.check, workshop.tracking.check):
        patiently(check, config.stages, workshop.display.line)
    if (warning := misplaced(tracking)) is not None:
        workshop.display.line(f"warning: {warning}")
    close_dead_runs(workshop.tracking, workshop.store)
    anew = () if resumed() else force  # what a run has forced before it was suspended is made
    planned = patiently(
        lambda: part.plan(config, workshop.store, pipeline, anew, deployed=deployed()),
        config.stages,
        workshop.display.line,
    )
    nodes = [item.node for item in planned]
    whole = not part.until  # also where every node is needed for it: who stops at the report looks before promoting
    checks = pipeline.checks() if pipeline.checks is not None else None
    forced = forced_nodes(nodes, anew)
    concluding = pipeline.course(config, forced_nodes(nodes, force)) if pipeline.course is not None else None
    course = concluding if whole else None
    workshop.display.left_over(planned)
    workshop.display.lines(checks.before(planned) if checks is not None else [])
    record = RunRecord(workshop.tracking, config.name, config.model_dump(mode="json"))
    workshop = dataclasses.replace(workshop, refresh_run=record.open)
    made: dict[str, Made] = {}
    status: Status = "KILLED"
    ended = "**Stopped.** The same command goes on."
    conclusion: Conclusion | None = None
    try:
        conclusion = _make_all(workshop, nodes, forced, made, checks, course)
        refs = _refs(made)
        run_id = record.settle(refs)
        if conclusion is None and pipeline.compared is not None and "evaluation" in made:
            found = pipeline.compared(Folders(workshop.store, refs))
            log_models(tracking, workshop.store.manifest(refs["evaluation"]), run_id, found)
        if conclusion is None and (review := _review(workshop, made)) is not None:
            show_verdict(config.name, f"{review.description}{tracking.link(run_id)}", workshop.display.line)
        if conclusion is None and course is not None:
            registered.note(tracking)
            conclusion = patiently(
                lambda: course.finish(Refs(workshop.store, refs), record.settle(refs)),
                config.stages,
                workshop.display.line,
            )
        status = "FINISHED"
        if whole:
            hold(config.name, held(config.name), ended=True)
    except StageInterrupted:
        raise
    except Pause:  # a person is asked; the run goes on from what is made
        status = "FINISHED"
        raise
    except Exception as error:
        status, ended = "FAILED", f"**Failed.** {redacted(one_line(error))}"
        raise
    finally:
        figures, tags = _reviewed(workshop, made, conclusion, concludes=concluding is not None)
        if status != "FINISHED":
            tags[NOTE] = f"{ended}\n\n{tags.get(NOTE, '')}".strip()
        record.close(
            status,
            _refs(made),
            figures,
            _report(workshop, made),
            tags,
            pipeline.data,
            concluded=conclusion is not None,
        )
        if tracking.missed and status != "KILLED":  # of stages that ended while it was away
            close_dead_runs(tracking, workshop.store)
        kept = course.decisive if course is not None else ()
        if status != "FINISHED" and (told := _still_forced(forced, made, kept)):
            workshop.display.line(told)
    if conclusion is not None:
        workshop.display.line(conclusion.message)
    return {name: _described(each) for name, each in made.items()}, conclusion


def _make_all(
    workshop: Workshop,
    nodes: Sequence[Node],
    forced: Collection[str],
    made: dict[str, Made],
    checks: Checks | None,
    course: Course | None,
) -> Conclusion | None:
    """Every node, until the course says that the run may end."""
    states: dict[str, State[Any]] = {}
    for node in nodes:
        workshop.check()
        inputs: dict[str, ArtifactRef] = {name: made[source].ref for name, source in node.inputs.items()}
        upstream = [states[source] for source in dict.fromkeys(node.inputs.values())]
        try:
            made[node.name], states[node.name] = run_node(workshop, node, inputs, upstream, force=node.name in forced)
        except DraftsmithError as error:
            if SOURCES in node.inputs:
                forget(workshop.config.name, error)
            raise
        if node.stage.name == SOURCES:
            hold(workshop.config.name, {**held(workshop.config.name), node.name: made[node.name].ref.key})
        folders = Folders(workshop.store, _refs(made))
        if checks is not None:
            workshop.display.lines(checks.after(node, folders))
        if course is not None:
            conclusion = patiently(partial(course.stop, node, folders), workshop.config.stages, workshop.display.line)
            if conclusion is not None:
                return conclusion
    return None


def _still_forced(forced: Collection[str], made: Mapping[str, Made], kept: Collection[str]) -> str | None:
    """What to force in the next run, where some of it is done: else it would be made once more. kept: names that decide
    how far the next one goes."""
    done = sorted(name for name in forced if name in made and not made[name].reused and name not in kept)
    rest = "".join(f" --force {name}" for name in sorted(set(forced) - set(done) | set(kept)))
    if not done:
        return None
    return f"{', '.join(done)}: made again and complete; go on{f' with{rest} only' if rest else ' without --force'}"


def _refs(made: Mapping[str, Made]) -> dict[str, ArtifactRef]:
    return {name: each.ref for name, each in made.items()}


def _reviewed(
    workshop: Workshop, made: Mapping[str, Made], conclusion: Conclusion | None, *, concludes: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Figures and tags of the run: of the headline's node, of the review, and what the run came to. concludes: whether
    something follows from what was made, if it comes so far."""
    node, figures, tags = made.get(workshop.pipeline.headline), {}, {}
    if node is not None:
        figures = dict(workshop.store.manifest(node.ref).metrics)
    review = _review(workshop, made)
    if review is not None:
        figures |= review.figures
        tags = {**review.tags, NOTE: review.description if conclusion is None else review.concluded}
        if concludes and conclusion is None:
            tags.pop(OUTCOME, None)
            tags[NOTE] = f"**Nothing has followed from this yet.**\n\n{review.description}"
    if conclusion is not None:
        figures |= conclusion.figures
        tags |= conclusion.tags
        if NOTE not in tags or conclusion.overrules:
            tags[NOTE] = f"**{conclusion.name}.** {conclusion.message}"
    return figures, tags


def _review(workshop: Workshop, made: Mapping[str, Made]) -> RunReview | None:
    folders = Folders(workshop.store, _refs(made))
    return workshop.pipeline.review(folders) if workshop.pipeline.review is not None else None


def _report(workshop: Workshop, made: Mapping[str, Made]) -> list[Path]:
    name, file = workshop.pipeline.report
    path = Folders(workshop.store, _refs(made))[name] / file if name in made else None
    return [path] if path is not None and path.is_file() else []


def _described(made: Made) -> dict[str, Any]:
    ref = made.ref
    return {
        "stage": ref.stage,
        "key": ref.key,
        "content_id": ref.content_id,
        "path": str(ref.path),
        "reused": made.reused,
    }
