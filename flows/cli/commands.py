"""The commands, by their names in `main.py`.

`main.py` imports this module after it has parsed the arguments, so that the help imports nothing heavy. What is
imported here costs little next to the graph of a refresh, which every command needs. Torch, Prefect and MLflow cost
seconds: the modules imported here load them on first use.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import time
import webbrowser
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, RefusedError, RetryableError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.host import GPU_MODELS, visible_gpus
from draftsmith.artifacts.store.manifest import local_time
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.artifacts.store.retention import (
    REPLACED_ARTIFACT,
    Leftover,
    exclusive_for_prune,
    leftovers,
    unused_artifacts,
)
from draftsmith.artifacts.tracking.registry import Registry, describe_other_trackers
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.checks.check import check
from draftsmith.flows.checks.findings import show
from draftsmith.flows.cli.status import find_report, show_artifact, show_config_status, show_store_status
from draftsmith.flows.cli.why import explain_key
from draftsmith.flows.config.load import read_config
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import Display, EndedRun, folded_table, format_bytes
from draftsmith.flows.execution.retry import with_retries
from draftsmith.flows.orchestration.launch import launch
from draftsmith.flows.orchestration.server import permanent_server, prepare
from draftsmith.flows.planning.graph import Selection
from draftsmith.flows.planning.plan import Pipeline, early_end, plan, to_check
from draftsmith.flows.refresh import registry_commands
from draftsmith.flows.refresh.champion import restarted
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.diff import version_diff
from draftsmith.flows.refresh.graph import REFRESH, WATCH
from draftsmith.flows.refresh.init import QUESTIONS, SIZES, write_first_config
from draftsmith.flows.refresh.measurements import DIAGNOSE, EVALUATE, diagnose_config, evaluate_config
from draftsmith.stages.evaluation.drift import DriftConfig
from draftsmith.stages.runtime.invocation import COMMAND


def _run(options: argparse.Namespace, pipeline: Pipeline) -> None:
    """Run the flow of a refresh, an evaluation or a diagnosis and print its results, or only print its plan."""
    began, selection = time.monotonic(), Selection.from_options(options.force, options.start, options.until)
    kind, config = _KINDS.get(options.command, _of_file)(options, pipeline)
    if options.plan:
        _show_plan(kind, kind.resolve(config), selection)
        return
    run = launch(config, kind, selection, lambda: setattr(options, "lost_prefect", True))
    refusal = run.conclusion.error if run.conclusion is not None else None
    if options.until:
        for name, folder in run.folders.items():
            run.display.line(f"{name}: {folder}")
    else:
        outcome = run.conclusion.name if run.conclusion is not None else None
        command, seconds = (str(options.config), options.overrides, run.tracking.ui_command), time.monotonic() - began
        kind.show(run.display, run.folders, EndedRun(run.config, *command, seconds, outcome, refusal))
    if refusal is not None:
        raise refusal


def _of_file(options: argparse.Namespace, pipeline: Pipeline) -> tuple[Pipeline, RunOptions]:
    typed = {"config": str(options.config), "overrides": options.overrides, "mlflow": Tracking(home()).ui_command}
    os.environ[COMMAND] = json.dumps(typed)
    return pipeline, _read_unresolved(options, pipeline)


def _evaluation(options: argparse.Namespace, _pipeline: Pipeline) -> tuple[Pipeline, RunOptions]:
    return EVALUATE, evaluate_config(_read_refresh(options), options.drafters)


def _diagnosis(options: argparse.Namespace, _pipeline: Pipeline) -> tuple[Pipeline, RunOptions]:
    refresh = _read_refresh(options)
    return DIAGNOSE, diagnose_config(refresh, options.url, options.drafter, options.prompts, options.api_key_env)


_KINDS: Mapping[str, Callable[[argparse.Namespace, Pipeline], tuple[Pipeline, RunOptions]]] = {
    "evaluate": _evaluation,
    "diagnose": _diagnosis,
}


def _show_plan(pipeline: Pipeline, config: RunOptions, selection: Selection) -> None:
    """Print what a run of a resolved config would do."""
    display, store = Display(), open_store(home())
    builds = with_retries(lambda: plan(config, store, pipeline, selection), config.stages, display.line)
    end = early_end(pipeline, config, builds, store, selection)
    display.plan(builds, end)
    display.newer_files(builds)
    display.lines(pipeline.check(to_check(builds, end)))


def _init(options: argparse.Namespace, pipeline: Pipeline) -> None:
    answers = {name: getattr(options, name) for name in QUESTIONS}
    size = write_first_config(options.file, options.beginning, options.size, options.training, answers)
    command = shlex.join(["draftsmith", "run", str(options.file)])
    Display().line(f"{options.file}: written. If its check passes, run it: {command}")
    options.config, options.overrides = options.file, []
    options.gpu = "H100" if size is not SIZES["laptop"] and not visible_gpus() else None  # for another machine
    _check(options, pipeline)


def _check(options: argparse.Namespace, pipeline: Pipeline) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the checks import the library
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    config, display = _read_config(options, pipeline), Display()
    findings = check(config, pipeline, home(), GPU_MODELS.get(options.gpu))
    show(display, findings.lines)
    display.line(findings.summary)
    if findings.errors:
        raise DraftsmithError(
            f"{findings.errors} of {len(findings.lines)} checks failed. Correct {options.config} as they say."
        )
    if findings.unreachable:
        raise RetryableError(
            f"{', '.join(findings.unreachable)}: not checked, because the hub, a bucket or a server is unreachable. "
            "Check again on a machine that reaches it."
        )


def _stage(options: argparse.Namespace, pipeline: Pipeline) -> None:
    """Make one node with its inputs from the store, without Prefect's server."""
    prepare(home())
    from draftsmith.flows.orchestration.run import Run  # imports Prefect, which reads its environment

    selection = Selection.of_stage(options.name, force=options.force)
    run = Run(pipeline, _read_unresolved(options, pipeline), selection)
    run.do(Run.make_all)
    name = run.plan[-1].name  # its inputs come before
    run.display.line(f"{name}: {run.made[name].path}")


def _why(options: argparse.Namespace, pipeline: Pipeline) -> None:
    explain_key(Display(), _read_config(options, pipeline), pipeline, options.name)


def _status(options: argparse.Namespace, pipeline: Pipeline) -> None:
    if options.config is None:
        show_store_status(Display())
    elif _is_file(options.config):
        if options.url:
            raise DraftsmithError("--url applies to a model line, and this is a config file. Give the line's name.")
        show_config_status(Display(), _read_config(options, pipeline), pipeline)
    else:
        from draftsmith.flows.refresh.line_page import show_line  # imports a client of servers

        show_line(Display(), str(options.config), options.url)


def _watch(options: argparse.Namespace, pipeline: Pipeline) -> None:
    from draftsmith.flows.refresh.watch import watch  # imports a client of servers

    line, urls, drift = str(options.config), options.url, DriftConfig()
    if _is_file(options.config):
        config = read_config(options.config, options.overrides, RefreshConfig)
        if config.registry is None:
            raise DraftsmithError(f"{options.config}: names no model line to watch. Set registry.name.")
        line, urls, drift = config.registry.name, urls or config.registry.servers, config.drift
    elif options.then == "refresh":
        raise DraftsmithError(f"--then refresh: {line} is a line. Give the config file that refreshes it.")
    outcome, sentence = watch(line, urls, options.minutes, drift.threshold)
    if outcome == "mismatched" or (outcome == "below" and options.then is None):
        raise RefusedError(sentence)
    Display().line(f"{outcome}: {sentence}")
    if outcome == "below" and options.then == "refresh":
        _run(options, pipeline)
    elif outcome == "below":
        registry_commands.rollback(Display(), line, sentence, dry_run=False, servers=urls)


def _is_file(path: Path) -> bool:
    """Return whether `path` is a config file, not the name of a line."""
    return path.suffix in (".yaml", ".yml") or path.is_file()


def _report(options: argparse.Namespace, pipeline: Pipeline) -> None:
    page = find_report(options.refresh, pipeline)
    Display().line(str(page))
    if options.open:
        webbrowser.open(page.as_uri())


def _diff(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    head, rows = version_diff(options.first, options.second)
    Display().table(head, rows, text_columns=len(head))


def _deploy(options: argparse.Namespace, pipeline: Pipeline) -> None:
    config = read_config(options.config, options.overrides, pipeline.config)
    arguments: dict[str, object] = {name: getattr(options, name) for name in ("force", "start", "until")}
    if named := any(arguments.values()):  # unknown nodes fail now; resolved, as a champion adds nodes
        selection = Selection.from_options(options.force, options.start, options.until)
        selection.check_names(pipeline.nodes(pipeline.resolve(config)))
    if options.watch is not None:
        if named:
            raise DraftsmithError(
                "--force, --from, --until: a watch makes no node. Remove them, or deploy the refresh with them."
            )
        refresh = f"refresh/{config.name.replace('/', '-')}"
        arguments = {"then": {"report": None, "refresh": refresh, "rollback": "rollback"}[options.watch]}
        config = config.model_copy(update={"name": f"{config.name}-watch"})
        pipeline = WATCH
    api = permanent_server(home())
    # imports Prefect, which reads the environment that `permanent_server` sets
    from draftsmith.flows.orchestration.deployment import deploy, schedules_of

    schedules = schedules_of(options.cron, options.timezone)
    done = deploy(config, pipeline, api, pool=options.pool, folder=Path.cwd(), schedules=schedules, arguments=arguments)
    Display().line(done)


def _swap(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    if options.forget:
        registry_commands.forget_servers(Display(), options.version, options.forget)
    else:
        registry_commands.swap(Display(), options.version, options.url)


def _prune(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    with exclusive_for_prune(home()) if options.artifacts and options.delete else nullcontext():
        prune(Display(), options.days, artifacts=options.artifacts, delete=options.delete)


def _read_config(options: argparse.Namespace, pipeline: Pipeline) -> RunOptions:
    """Return the config with what must be looked up, such as the line's champion."""
    config: RunOptions = pipeline.resolve(_read_unresolved(options, pipeline))
    return config


def _read_unresolved(options: argparse.Namespace, pipeline: Pipeline) -> RunOptions:
    config = read_config(options.config, options.overrides, pipeline.config)
    return restarted(config) if options.restart else config


def _read_refresh(options: argparse.Namespace) -> RefreshConfig:
    config = _read_config(options, REFRESH)
    assert isinstance(config, RefreshConfig)
    return config


COMMANDS: Mapping[str, Callable[[argparse.Namespace, Pipeline], None]] = {
    "run": _run,
    "check": _check,
    "init": _init,
    "stage": _stage,
    "why": _why,
    "status": _status,
    "watch": _watch,
    "show": lambda options, _: show_artifact(Display(), options.artifact, verify=options.verify),
    "report": _report,
    "diff": _diff,
    "champions": lambda options, _: registry_commands.champions(Display(), options.line),
    "promote": lambda options, _: registry_commands.promote(
        Display(), options.version, options.why, dry_run=options.dry_run, servers=options.url
    ),
    "rollback": lambda options, _: registry_commands.rollback(
        Display(), options.line, options.why, dry_run=options.dry_run, servers=options.url
    ),
    "swap": _swap,
    "export": lambda options, _: registry_commands.export(
        Display(), options.version, options.folder, options.format, calibrated=options.calibrated
    ),
    "evaluate": _run,
    "diagnose": _run,
    "deploy": _deploy,
    "prune": _prune,
}


def prune(display: Display, days: float, *, artifacts: bool, delete: bool) -> None:
    """List or delete leftovers that were not touched for `days` days.

    artifacts: also complete artifacts that no run has used for `days` days, except those that model lines need.
    """
    before = time.time() - days * 86400
    obsolete = leftovers(home(), before)
    replaced = [item for item in obsolete if item.kind == REPLACED_ARTIFACT]
    obsolete = [item for item in obsolete if item not in replaced]
    if replaced and (needed := _ids_of_lines(display, "replaced artifacts", Registry.content_ids)) is not None:
        obsolete += [item for item in replaced if not _is_needed(item, needed)]
    if artifacts and (needed := _ids_of_lines(display, "complete artifacts", Registry.needed_content_ids)) is not None:
        obsolete += unused_artifacts(open_store(home()).root, before, needed)
    if not obsolete:
        display.line(f"nothing to remove: no leftover in {home()} is older than {days:g} days")
    elif delete:
        _delete(display, obsolete)
    else:
        _list(display, obsolete, f"draftsmith prune {'--artifacts ' if artifacts else ''}--days {days:g} --delete")
    if not artifacts:
        display.line("Complete artifacts are kept. `--artifacts` also removes those that nothing needs any more.")


def _ids_of_lines(display: Display, what: str, ask: Callable[[Registry], set[str]]) -> set[str] | None:
    """Return the content ids that model lines need. If they are unknown, print why and return None.

    Nothing is deleted then: the store may hold the only copy of a champion.
    """
    tracking = Tracking(home())
    if (why := describe_other_trackers(tracking)) is not None:
        display.line(f"{what} are kept: {why}")
        return None
    try:
        return ask(Registry(tracking))
    except DraftsmithError as error:
        display.line(f"{what} are kept, because it is unknown whether a model line needs them: {error}")
        return None


def _is_needed(replaced: Leftover, needed: set[str]) -> bool:
    return replaced.content is not None and any(content_id.startswith(replaced.content) for content_id in needed)


def _list(display: Display, obsolete: Sequence[Leftover], command: str) -> None:
    table = folded_table("what", "path", "size", "last touched")
    for item in obsolete:
        path, touched = str(item.path.relative_to(home())), local_time(item.touched)
        table.add_row(item.kind, path, format_bytes(item.bytes), touched)
    display.console.print(table)
    display.line(f"{_total(obsolete)} in all. `{command}` removes them.")


def _delete(display: Display, obsolete: Sequence[Leftover]) -> None:
    removed = [item for item in obsolete if item.remove()]
    kept = ", ".join(item.path.name for item in obsolete if item not in removed)
    display.line(f"removed {_total(removed)}" + (f", except what a run is using again: {kept}" if kept else ""))


def _total(items: Sequence[Leftover]) -> str:
    return format_bytes(sum(item.bytes for item in items))
