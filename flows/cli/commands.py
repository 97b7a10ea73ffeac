"""What every command does, by its name in `arguments.py`. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.artifacts.home import home

if TYPE_CHECKING:
    from draftsmith.flows.config.options import RunOptions
    from draftsmith.flows.execution.display import Display
    from draftsmith.flows.orchestration.server import PrefectServer
    from draftsmith.flows.planning.graph import Pipeline, PlannedNode
    from draftsmith.flows.refresh.config import RefreshConfig


def _run(options: argparse.Namespace, pipeline: Pipeline) -> None:
    """Run the config's flow and print what it found, or only print the plan."""
    from draftsmith.stages.report.next_steps import COMMAND

    os.environ[COMMAND] = json.dumps({"config": str(options.config), "overrides": options.overrides})
    _run_config(options, pipeline, _read(options, pipeline, patient=not options.plan))


def _evaluate(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    from draftsmith.flows.refresh.evaluate import EVALUATE, evaluate_config

    _run_config(options, EVALUATE, evaluate_config(_read_refresh(options), options.drafters))


def _diagnose(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    from draftsmith.flows.refresh.diagnose import DIAGNOSE, NODE, diagnose_config

    config = _read_refresh(options)
    options.force = [*options.force, NODE]  # what a server does is not known from before
    asked = diagnose_config(config, options.url, options.drafter, options.prompts, options.api_key_env)
    _run_config(options, DIAGNOSE, asked)


def _run_config(options: argparse.Namespace, pipeline: Pipeline, config: RunOptions) -> None:
    from draftsmith.artifacts.store.mirror import open_store
    from draftsmith.artifacts.tracking.runs import Tracking
    from draftsmith.flows.execution.display import EndedRun
    from draftsmith.flows.execution.retry import with_retries
    from draftsmith.flows.orchestration.launch import launch
    from draftsmith.flows.planning.graph import Selection, load_attribute, plan

    began, display = time.monotonic(), _display()
    store, selection = open_store(home()), Selection.from_options(options.force, options.start, options.until)
    planned = with_retries(lambda: plan(config, store, pipeline, selection), config.stages, display.line)
    display.plan(planned)
    if options.plan:
        display.newer_files(planned)  # a run says it where it begins
        display.lines(pipeline.checks().before(planned) if pipeline.checks is not None else [])
        return

    def lost(server: PrefectServer, what: str) -> None:
        display.line(f"warning: {what}")
        options.lost_prefect = server

    finished = launch(config, pipeline, display, lost, selection)
    if options.until:
        for name, folder in finished.artifacts.items():
            display.line(f"{name}: {folder}")
    elif finished.artifacts and pipeline.results:
        refused = str(finished.refusal) if finished.refusal is not None else None
        passed, ui_command = time.monotonic() - began, Tracking(home(), config.experiment).ui_command
        ending = EndedRun(config, str(options.config), options.overrides, ui_command, passed, refused)
        load_attribute(pipeline.results)(display, finished.artifacts, ending)
    if finished.refusal is not None:
        raise finished.refusal


def _init(options: argparse.Namespace, pipeline: Pipeline) -> None:
    from draftsmith.flows.refresh.init import QUESTIONS, write_first_config

    write_first_config(options.file, options.beginning, {name: getattr(options, name) for name in QUESTIONS})
    command = shlex.join(["draftsmith", "run", str(options.file)])
    _display().line(f"{options.file}: written. When its check is good: {command}")
    options.config, options.overrides = options.file, []
    _check(options, pipeline)


def _check(options: argparse.Namespace, pipeline: Pipeline) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the library is imported
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from draftsmith.flows.checks.check import check
    from draftsmith.flows.checks.findings import show

    config = _read(options, pipeline)
    found = check(config, pipeline, home())
    show(_display(), found.lines)
    _display().line(found.summary)
    if found.errors:
        raise DraftsmithError(
            f"{found.errors} of {len(found.lines)} checks failed: {options.config} cannot run like this"
        )
    if found.unreachable:
        raise RetryableError(
            f"{', '.join(found.unreachable)}: not checked, as something outside could not be reached. Check again on a "
            "machine that reaches it."
        )


def _stage(options: argparse.Namespace, pipeline: Pipeline) -> None:
    from draftsmith.artifacts.store.retention import artifacts_in_use

    config = _read(options, pipeline)
    with artifacts_in_use(home(), config.name, _display().line):
        _make_alone(options, pipeline, config)


def _make_alone(options: argparse.Namespace, pipeline: Pipeline, config: RunOptions) -> None:
    from draftsmith.artifacts.store.mirror import open_store
    from draftsmith.artifacts.tracking.runs import Tracking
    from draftsmith.flows.checks.check import check_node
    from draftsmith.flows.execution.machine import check_home
    from draftsmith.flows.execution.node import RunContext, build_node
    from draftsmith.flows.execution.results import ArtifactFolders
    from draftsmith.flows.execution.retry import with_retries
    from draftsmith.flows.planning.graph import Selection, plan
    from draftsmith.flows.planning.inputs import forget_listings, note_listings, read_listings
    from draftsmith.stages.runtime.stage import SOURCES

    # a damaged artifact is no matter unless it is needed: it may be the one that is to be made again
    store, forced = open_store(home()), (options.name,) if options.force else ()
    items = plan(config, store, pipeline, Selection(force=forced, reuse_listing=True), stop_at_damage=False)
    planned = {item.node.name: item for item in items}
    if options.name not in planned:
        raise DraftsmithError(f"no node {options.name!r}: use one of {', '.join(planned)}")
    node = planned[options.name].node
    inputs = {}
    for name, source in node.inputs.items():
        if (damage := planned[source].damage) is not None:
            raise damage
        if (ref := planned[source].ref) is None:
            raise DraftsmithError(_missing_input(options, name, planned[source]))
        inputs[name] = ref
    check_home(home(), config)
    display, tracking = _display(), Tracking(home(), config.experiment)
    display.newer_files(items)
    display.lines(check_node(node, ArtifactFolders(store, inputs)))
    for check in (store.check, tracking.check):
        with_retries(check, config.stages, display.line)
    context = RunContext(home(), config, pipeline, display, tracking)
    try:
        made = with_retries(lambda: build_node(context, node, inputs, force=options.force), config.stages, display.line)
    except DraftsmithError as error:
        if SOURCES in inputs:
            forget_listings(config.name, error)
        raise
    if node.stage.name == SOURCES:  # it begins no run, and ends none
        keys = {**read_listings(config.name, ended=True), node.name: made.ref.key}
        note_listings(config.name, keys, ended=not read_listings(config.name))
    display.line(f"{node.name}: {made.ref.path}")


def _missing_input(options: argparse.Namespace, name: str, source: PlannedNode) -> str:
    from draftsmith.flows.planning.graph import Status

    rest = [str(options.config), *(word for override in options.overrides for word in ("--set", override))]
    made_alone = source.status is not Status.AFTER  # else its own inputs are missing too
    command = ["draftsmith", "stage", source.node.name, *rest] if made_alone else ["draftsmith", "run", *rest]
    return (
        f"stage {options.name}: its input {name!r} (node {source.node.name}) is not in the store: make it with "
        f"`{shlex.join(command)}`"
    )


def _why(options: argparse.Namespace, pipeline: Pipeline) -> None:
    from draftsmith.flows.cli.why import why

    why(_display(), _read(options, pipeline), pipeline, options.name)


def _status(options: argparse.Namespace, pipeline: Pipeline) -> None:
    from draftsmith.flows.cli import status

    if options.config is None:
        status.status_of_store(_display())
    else:
        status.status_of_config(_display(), _read(options, pipeline), pipeline)


def _show(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    from draftsmith.flows.cli import status

    status.show(_display(), options.artifact, verify=options.verify)


def _report(options: argparse.Namespace, pipeline: Pipeline) -> None:
    from draftsmith.flows.refresh.find_report import find_report

    page = find_report(options.refresh, pipeline)
    _display().line(str(page))
    if options.open:
        import webbrowser

        webbrowser.open(page.as_uri())


def _champions(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    from draftsmith.flows.refresh import registry_commands

    registry_commands.champions(_display(), options.line)


def _promote(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    from draftsmith.flows.refresh import registry_commands

    registry_commands.promote(_display(), options.version, options.why, dry_run=options.dry_run)


def _rollback(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    from draftsmith.flows.refresh import registry_commands

    registry_commands.rollback(_display(), options.line, options.why, dry_run=options.dry_run)


def _export(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    from draftsmith.flows.refresh import registry_commands

    registry_commands.export(_display(), options.version, options.folder, options.format, dry_run=options.dry_run)


def _deploy(options: argparse.Namespace, pipeline: Pipeline) -> None:
    from draftsmith.flows.config.load import read_config
    from draftsmith.flows.orchestration.server import permanent_server
    from draftsmith.flows.planning.graph import Selection

    config = read_config(options.config, options.overrides, pipeline.config)
    Selection(force=tuple(options.force)).forced(pipeline.nodes(config))  # said here, not when it runs at night
    api = permanent_server(home())
    from draftsmith.flows.orchestration.deployment import Schedule, deploy

    schedule = Schedule(options.cron, options.timezone)
    made = deploy(
        config,
        pipeline,
        api,
        pool=options.pool,
        schedule=schedule,
        force=options.force,
        webhook=options.webhook,
        silent_days=options.silent_after,
        folder=Path.cwd(),
    )
    when = f"{options.cron} ({options.timezone})" if options.cron else "when it is asked to"
    became = "created" if made.created else "changed"
    told = "with its webhook" if made.webhook else "without a webhook"
    if made.webhook and options.webhook is None:
        told = "with the webhook that it had"
    _display().line(f"{made.name}: {became}, in work pool {options.pool}, {when}, {told}: {made.url}")


def _prune(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    from draftsmith.flows.cli.prune import prune

    prune(_display(), options.days, artifacts=options.artifacts, delete=options.delete)


def _read(options: argparse.Namespace, pipeline: Pipeline, *, patient: bool = False) -> RunOptions:
    """The config, with what only the outside knows. patient: ask again for minutes, as everything of a run is."""
    from draftsmith.flows.config.load import read_config
    from draftsmith.flows.execution.retry import with_retries
    from draftsmith.flows.planning.graph import resolve_config

    config = read_config(options.config, options.overrides, pipeline.config)
    if not patient:
        return resolve_config(config, pipeline)
    return with_retries(lambda: resolve_config(config, pipeline), config.stages, _display().line)


def _read_refresh(options: argparse.Namespace) -> RefreshConfig:
    from draftsmith.flows.refresh.config import RefreshConfig
    from draftsmith.flows.refresh.graph import REFRESH

    config = _read(options, REFRESH)
    assert isinstance(config, RefreshConfig)
    return config


def _display() -> Display:
    from draftsmith.flows.execution.display import Display

    return Display()


COMMANDS = {
    "run": _run,
    "check": _check,
    "init": _init,
    "stage": _stage,
    "why": _why,
    "status": _status,
    "show": _show,
    "report": _report,
    "champions": _champions,
    "promote": _promote,
    "rollback": _rollback,
    "export": _export,
    "evaluate": _evaluate,
    "diagnose": _diagnose,
    "deploy": _deploy,
    "prune": _prune,
}
