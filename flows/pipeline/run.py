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
from prefect.context import FlowRunContext
from prefect.events import emit_event
from prefect.states import Cancelled, Completed, Failed

from draftsmith.artifacts.dead_runs import close_dead_runs
from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted, one_line
from draftsmith.artifacts.home import home
from draftsmith.artifacts.manifest import ArtifactRef
from draftsmith.artifacts.mlflow_files import misplaced
from draftsmith.artifacts.mlflow_terms import Status
from draftsmith.artifacts.proxies import reach_ourselves_directly
from draftsmith.artifacts.redaction import redact_logs, redacted
from draftsmith.artifacts.refreshes import OUTCOME
from draftsmith.artifacts.tracking import NOTE, Tracking
from draftsmith.artifacts.unused import in_use
from draftsmith.flows.pipeline import registered
from draftsmith.flows.pipeline.cancellation import Cancellation, CancelledError
from draftsmith.flows.pipeline.delivery import body
from draftsmith.flows.pipeline.display import Display
from draftsmith.flows.pipeline.fetched import Folders, Refs
from draftsmith.flows.pipeline.graph import Checks, Conclusion, Course, Node, Pipeline, forced_nodes, resolved
from draftsmith.flows.pipeline.listing import forget, held, hold
from draftsmith.flows.pipeline.machine import check_home
from draftsmith.flows.pipeline.node import Made, Workshop
from draftsmith.flows.pipeline.options import RunOptions, check_runner
from draftsmith.flows.pipeline.part import Part
from draftsmith.flows.pipeline.patience import patiently
from draftsmith.flows.pipeline.record import RunRecord
from draftsmith.flows.pipeline.task import run_node
from draftsmith.stages.contract import SOURCES


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
                _tell(config, conclusion)
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


def _tell(config: RunOptions, conclusion: Conclusion) -> None:
    emit_event(
        event=f"draftsmith.{conclusion.name.lower()}",
        resource={"prefect.resource.id": f"draftsmith.run.{config.name}", "prefect.resource.name": config.name},
        payload={"message": conclusion.message, "figures": dict(conclusion.figures), "tags": dict(conclusion.tags)},
    )


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
    planned = patiently(
        lambda: part.plan(config, workshop.store, pipeline, force, deployed=_deployed()),
        config.stages,
        workshop.display.line,
    )
    nodes = [item.node for item in planned]
    whole = not part.until  # also where every node is needed for it: who stops at the report looks before promoting
    checks = pipeline.checks() if pipeline.checks is not None else None
    forced = forced_nodes(nodes, force)
    concluding = pipeline.course(config, forced) if pipeline.course is not None else None
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
        record.settle(refs)
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


def _deployed() -> bool:
    """Whether a deployment runs it: on a schedule, or because somebody asks for one more of its runs."""
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and context.flow_run.deployment_id is not None


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
    folders = Folders(workshop.store, _refs(made))
    review = workshop.pipeline.review(folders) if workshop.pipeline.review is not None else None
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
