"""The body of a flow: makes the checks, runs each node as a task, and records the run in MLflow."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import State
from prefect.exceptions import Pause
from prefect.states import Cancelled, Completed, Failed

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted, one_line
from draftsmith.artifacts.home import home
from draftsmith.artifacts.host import bypass_proxy_for_localhost
from draftsmith.artifacts.redaction import redact_logs
from draftsmith.artifacts.results.data import LogsSummary, day
from draftsmith.artifacts.results.gate import ReviewResult
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.store.retention import artifacts_in_use
from draftsmith.artifacts.tracking.refresh_runs import (
    CONTINUE,
    OUTCOME,
    VERSION,
    RunRecord,
    close_dead_runs,
    describe_misplaced_files,
    log_models,
)
from draftsmith.artifacts.tracking.registry import note_tracker
from draftsmith.artifacts.tracking.runs import NOTE, Tracking
from draftsmith.artifacts.tracking.terms import Status
from draftsmith.flows.config.options import RunOptions, check_runner
from draftsmith.flows.execution.display import Display
from draftsmith.flows.execution.machine import check_home
from draftsmith.flows.execution.make import RunContext
from draftsmith.flows.execution.retry import with_retries
from draftsmith.flows.orchestration.flow_run import (
    Cancellation,
    CancelledError,
    announce,
    deployed,
    flow_result,
    page_url,
    resumed,
    show_verdict,
)
from draftsmith.flows.orchestration.tasks import run_node
from draftsmith.flows.planning.graph import Selection
from draftsmith.flows.planning.inputs import forget_listings, note_listings, read_listings
from draftsmith.flows.planning.plan import (
    Build,
    Checks,
    Conclusion,
    Pipeline,
    RunPolicy,
    RunReview,
    plan,
    planned_listings,
    resolve_config,
)
from draftsmith.stages.runtime.invocation import COMMAND, invocation


def run_graph(
    config: RunOptions,
    pipeline: Pipeline,
    force: Collection[str] | None = None,
    start: Collection[str] | None = None,
    until: Collection[str] | None = None,
) -> State[Any] | dict[str, Artifact]:
    """Make the nodes of the config's graph, or a selection of them, and act on the result unless nodes are left out.

    force, start, until: nodes, as in `Selection`. Returns the nodes' artifacts, or the flow's state if the run has a
    conclusion or was cancelled. A conclusion is also an event such as `draftsmith.promoted`.

    Raises the first DraftsmithError. Finished nodes stay in the store.
    """
    conclusion: Conclusion | None = None
    try:
        with flow_result() as result, Cancellation() as cancellation, _in_use(config, cancellation):
            selection = Selection.from_options(force, start, until, deployed=deployed())
            nodes, conclusion = _run(config, pipeline, selection, cancellation)
            result.nodes = nodes
            if conclusion is not None:
                result.conclusion = conclusion
                announce(config.name, conclusion)
                if conclusion.error is not None:
                    raise conclusion.error
    except CancelledError as error:
        return Cancelled(message=str(error))
    except DraftsmithError as error:
        if conclusion is None or error is not conclusion.error:
            raise
        # by its own name the state differs from a failure of the run, for automations
        return Failed(name=conclusion.name, message=conclusion.message, data=error)
    return nodes if conclusion is None else Completed(name=conclusion.name, message=conclusion.message, data=nodes)


def _in_use(config: RunOptions, cancellation: Cancellation) -> AbstractContextManager[None]:
    limit_s = 60 * config.stages.lock_wait_minutes
    return artifacts_in_use(home(), config.name, Display().line, limit_s=limit_s, check=cancellation.check)


def _run(
    config: RunOptions, pipeline: Pipeline, selection: Selection, cancellation: Cancellation
) -> tuple[dict[str, Artifact], Conclusion | None]:
    display = Display()
    if (page := page_url()) is not None:
        display.line(f"Prefect: {page}")
    given = config.model_dump(mode="json", exclude_defaults=True, exclude={"stages"})
    config = with_retries(lambda: resolve_config(config, pipeline), config.stages, display.line)
    redact_logs()
    bypass_proxy_for_localhost()  # a deployment's run does not come through the command
    logging.getLogger("draftsmith").setLevel(logging.INFO)  # else Prefect does not show the stages' lines
    tracking = Tracking(home(), config.experiment)
    context = RunContext(home(), config, pipeline, display, tracking, check=cancellation.check)
    check_home(context.home, config)
    check_runner(config.stages)
    for check in (context.store.check, context.tracking.check):
        with_retries(check, config.stages, context.display.line)
    if (warning := describe_misplaced_files(tracking)) is not None:
        context.display.line(f"warning: {warning}")
    close_dead_runs(context.tracking, context.store)
    requested = selection
    if resumed():  # forced nodes were made before the run was suspended
        selection = dataclasses.replace(selection, force=())
    planned = with_retries(
        lambda: plan(config, context.store, pipeline, selection), config.stages, context.display.line
    )
    nodes = [item.node for item in planned]
    note_listings(config.name, listings := {**read_listings(config.name), **planned_listings(planned)})
    # a run until a node never promotes, even if the node needs all others: it lets a person look first
    whole = not selection.until
    checks = pipeline.checks() if pipeline.checks is not None else None
    forced = selection.forced(nodes)
    asked = {*requested.forced(nodes), *requested.start}
    full_policy = pipeline.policy(config, asked) if pipeline.policy is not None else None
    policy = full_policy if whole else None
    context.display.newer_files(planned)
    context.display.lines(checks.before(planned) if checks is not None else [])
    record = RunRecord(context.tracking, config.name, given, pipeline.data)
    context = dataclasses.replace(context, refresh_run=record.open)
    results: dict[str, Artifact] = {}
    status: Status = "KILLED"
    ending = ""
    conclusion: Conclusion | None = None
    try:
        conclusion = _make_nodes(context, planned, forced, results, checks, policy)
        run_id = record.find_or_open(results)
        if conclusion is None and pipeline.compared is not None and "evaluation" in results:
            drafters = pipeline.compared(context.store.folders(results))
            log_models(tracking, results["evaluation"].manifest, run_id, drafters)
        if conclusion is None and (review := _review(context, results)) is not None:
            show_verdict(config.name, f"{review.description}{tracking.link(run_id)}", context.display.line)
        if conclusion is None and policy is not None:
            note_tracker(tracking)
            conclusion = with_retries(
                lambda: policy.conclude(context.store.folders(results), record.find_or_open(results)),
                config.stages,
                context.display.line,
            )
        status = "FINISHED"
        if whole:
            note_listings(config.name, listings, ended=True)
    except Pause:  # until a person approves; the resumed run reuses what is made
        status = "FINISHED"
        raise
    except BaseException as error:
        if isinstance(error, Exception) and not isinstance(error, StageInterrupted):
            status, ending = "FAILED", f"**Failed.** {one_line(error)} "
        command = _continuing_command(config, selection, forced, results, policy)
        ending = f"{ending or '**Stopped.** '}{CONTINUE} `{command or 'the same command'}`."
        if command is not None:
            error.add_note(command)
        raise
    finally:
        metrics, tags = _metrics_and_tags(context, results, conclusion, concludes=full_policy is not None)
        if status != "FINISHED":
            tags[NOTE] = f"{ending}\n\n{tags.get(NOTE, '')}".strip()
        record.close(
            status,
            results,
            metrics,
            _report(context, results),
            tags,
            name=_name(results, tags),
            concluded=conclusion is not None,
        )
        if tracking.had_failures and status != "KILLED":  # stages may have ended while MLflow was away
            close_dead_runs(tracking, context.store)
    if conclusion is not None:
        context.display.line(conclusion.message)
    return results, conclusion


def _make_nodes(
    context: RunContext,
    builds: Sequence[Build],
    forced: Collection[str],
    results: dict[str, Artifact],
    checks: Checks | None,
    policy: RunPolicy | None,
) -> Conclusion | None:
    """Make every node in order, until the policy ends the run. results: filled in, also when a node fails."""
    states: dict[str, State[Any]] = {}
    for build in builds:
        context.check()
        node = build.node
        upstream = [states[source] for source in dict.fromkeys(node.inputs.values())]
        try:
            made = run_node(context, build.complete(results), upstream, force=node.name in forced)
            results[node.name], states[node.name] = made
        except DraftsmithError as error:
            if node.config.listing is not None:
                forget_listings(context.config.name, error)
            raise
        folders = context.store.folders(results)
        if checks is not None:
            context.display.lines(checks.after(node, folders))
        if policy is not None:
            conclusion = with_retries(
                partial(policy.should_stop, node, folders), context.config.stages, context.display.line
            )
            if conclusion is not None:
                return conclusion
    return None


def _continuing_command(
    config: RunOptions,
    selection: Selection,
    forced: Collection[str],
    results: Mapping[str, Artifact],
    policy: RunPolicy | None,
) -> str | None:
    """Return the command that continues the run, which makes no complete node again; None if no command began it."""
    if (began := os.environ.get(COMMAND)) is None:
        return None
    force = {name for name in forced if name not in results or results[name].reused}
    if policy is not None and not force and not selection.start:
        force |= set(policy.sticky_force)
    named = {"--force": sorted(force), "--from": selection.start, "--until": selection.until}
    options = [word for option, names in named.items() for name in names for word in (option, name)]
    restart = getattr(getattr(config, "registry", None), "restart", False)
    return invocation(began, None).run(*options, *["--restart"] * restart)


def _metrics_and_tags(
    context: RunContext, results: Mapping[str, Artifact], conclusion: Conclusion | None, *, concludes: bool
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the run's metrics and tags for MLflow, from the headline's node, the review and the conclusion.

    concludes: whether a complete run of this kind has a conclusion.
    """
    node, metrics, tags = results.get(context.pipeline.headline), {}, {}
    if node is not None:
        metrics = dict(node.manifest.metrics)
    review = _review(context, results)
    if review is not None:
        metrics |= review.metrics
        tags = {**review.tags, NOTE: review.description if conclusion is None else review.concluded_description}
        if concludes and conclusion is None:
            tags.pop(OUTCOME, None)
            tags[NOTE] = f"**No action yet.**\n\n{review.description}"
    if conclusion is not None:
        metrics |= conclusion.metrics
        tags |= conclusion.tags
        if NOTE not in tags or conclusion.overrules_review:
            tags[NOTE] = f"**{conclusion.name}.** {conclusion.message}"
    return metrics, tags


def _name(results: Mapping[str, Artifact], tags: Mapping[str, str]) -> str | None:
    """Return the run's name in MLflow, such as `week of 24 Nov: promoted @3`; None without an outcome."""
    if OUTCOME not in tags:
        return None
    logs = LogsSummary.read_if_there(results["logs"].path) if "logs" in results else None
    when = (logs.window.text if logs is not None else "") or day(datetime.now(UTC))
    version = tags.get(VERSION, "").rpartition("@")[2]
    return f"{when}: {tags[OUTCOME]}{f' @{version}' if version else ''}"


def _review(context: RunContext, results: Mapping[str, Artifact]) -> RunReview | None:
    return context.pipeline.review(context.store.folders(results)) if context.pipeline.review is not None else None


def _report(context: RunContext, results: Mapping[str, Artifact]) -> list[Path]:
    name, page = context.pipeline.report
    folder = context.store.folders(results)[name] if name in results else None
    paths = [folder / file for file in (page, ReviewResult.FILE)] if folder is not None else []
    return [path for path in paths if path.is_file()]
