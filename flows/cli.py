"""The `draftsmith` command. Its help is instant: everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from draftsmith.artifacts.errors import EXIT_INTERRUPTED, DraftsmithError, RefusedError, from_os_error
from draftsmith.artifacts.home import home
from draftsmith.artifacts.printable import printable
from draftsmith.artifacts.private import private_files
from draftsmith.artifacts.redaction import redact_logs, redacted

if TYPE_CHECKING:
    from draftsmith.flows.pipeline.graph import Pipeline, PlannedNode
    from draftsmith.flows.pipeline.options import RunOptions

_EXIT_UNEXPECTED = 1
_EXIT_TERMINATED = 128 + signal.SIGTERM
_DESCRIPTION = "Keep the draft model of speculative decoding matched to its target."
_EPILOG = (
    "Everything is kept under DRAFTSMITH_HOME (.draftsmith here by default). PREFECT_API_URL and MLFLOW_TRACKING_URI "
    "switch to existing servers. DRAFTSMITH_DEBUG=1 shows tracebacks."
)


def main(arguments: Sequence[str] | None = None, pipeline: Pipeline | None = None) -> int:
    """Run the command and return its exit code. `pipeline` is the refresh unless given."""
    options = _parser().parse_args(arguments)
    code = _code_of(options, pipeline)
    if (server := getattr(options, "lost_prefect", None)) is not None:
        server.leave(code)
    return code


def _code_of(options: argparse.Namespace, pipeline: Pipeline | None) -> int:
    signal.signal(signal.SIGTERM, _terminate)
    redact_logs()
    _show_warnings()
    try:
        with private_files(home()):
            options.run(options, pipeline or _pipeline(options))
    except KeyboardInterrupt:
        return _fail(
            "interrupted; what was finished or saved is kept: run the same command again to continue", EXIT_INTERRUPTED
        )
    except SystemExit as ended:
        if ended.code != _EXIT_TERMINATED:
            raise
        return _fail(
            "terminated; what was finished or saved is kept: run the same command again to continue", _EXIT_TERMINATED
        )
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `draftsmith status | head`
        return 0
    except DraftsmithError as error:
        return _fail(str(error), error.exit_code, error)
    except OSError as error:
        disk = from_os_error(error, "working with")
        return _fail(str(disk), disk.exit_code, error)
    except Exception as error:
        text = " ".join(str(error).split()) or "no message"
        advice = "set DRAFTSMITH_DEBUG=1 for the traceback"
        return _fail(f"unexpected {type(error).__name__}: {text} ({advice})", _EXIT_UNEXPECTED, error)
    return 0


def _fail(message: str, code: int, error: BaseException | None = None) -> int:
    if error is not None and os.environ.get("DRAFTSMITH_DEBUG") == "1":
        import traceback

        print(redacted("".join(traceback.format_exception(error))), end="", file=sys.stderr)
    print(f"draftsmith: error: {printable(' '.join(redacted(message).split()))}", file=sys.stderr)
    return code


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(_EXIT_TERMINATED)


def _show_warnings() -> None:
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("draftsmith: %(levelname)s: %(message)s"))
    logging.getLogger("draftsmith").handlers = [handler]


def _pipeline(options: argparse.Namespace) -> Pipeline:
    """The kind of run that the command's config file describes: a refresh without a `kind`.

    Raises DraftsmithError for a kind that does not exist.
    """
    from draftsmith.flows.experiments.architectures import ARCHITECTURES
    from draftsmith.flows.experiments.arms import EXPERIMENT
    from draftsmith.flows.pipeline.config_file import kind_of
    from draftsmith.flows.refresh.graph import REFRESH

    config = getattr(options, "config", None)
    if config is None or (kind := kind_of(config)) is None:
        return REFRESH
    kinds = {"experiment": EXPERIMENT, "architectures": ARCHITECTURES}
    if not isinstance(kind, str) or kind not in kinds:
        raise DraftsmithError(f"{config}: kind is {kind!r}: use {' or '.join(kinds)}, or leave it out for a refresh")
    return kinds[kind]


# -- arguments -------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="draftsmith", description=_DESCRIPTION, epilog=_EPILOG)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        aliases=["refresh", "experiment"],
        help="run what the file describes, a refresh or an experiment; what has not changed is reused",
    )
    _add_run_options(run)
    run.set_defaults(run=_run)

    check = commands.add_parser("check", help="everything that can be checked before a run, without loading weights")
    _add_config(check)
    check.set_defaults(run=_check)

    stage = commands.add_parser("stage", help="run one node of the graph, with its inputs taken from the store")
    stage.add_argument("name", metavar="NAME", help="the node, as in `draftsmith run --plan`")
    _add_config(stage)
    stage.add_argument("--force", action="store_true", help="make it again although it is there")
    stage.set_defaults(run=_stage)

    why = commands.add_parser("why", help="what makes a node's key new: a field, an input, a file, code")
    _add_config(why)
    why.add_argument("name", metavar="NODE", help="the node, as in `draftsmith run --plan`")
    why.set_defaults(run=_why)

    status = commands.add_parser("status", help="what is done, unfinished, running or failed")
    _add_config(status, optional=True)
    status.set_defaults(run=_status)

    show = commands.add_parser("show", help="an artifact: where it comes from, its files, a look inside")
    show.add_argument("artifact", metavar="ARTIFACT", help="a stage, the start of a key or content id, or a path")
    show.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    show.set_defaults(run=_show)

    report = commands.add_parser("report", help="where a refresh's report is; of two refreshes, what differs")
    report.add_argument(
        "refreshes",
        metavar="REFRESH",
        nargs="+",
        help="a config file, a refresh's run in MLflow (name or id), an artifact",
    )
    report.add_argument("--open", action="store_true", help="show the page in the browser")
    report.set_defaults(run=_report)

    champions = commands.add_parser("champions", help="a line of drafters: who serves, since when and why")
    champions.add_argument("line", metavar="NAME", help="as in registry.name of a config")
    champions.set_defaults(run=_champions)

    promote = commands.add_parser("promote", help="make a version of a line the champion by hand")
    promote.add_argument("version", metavar="NAME@VERSION", help="such as smollm2@3 or smollm2@challenger")
    rollback = commands.add_parser("rollback", help="let the previous champion serve again")
    rollback.add_argument("line", metavar="NAME")
    for moved, run_it in ((promote, _promote), (rollback, _rollback)):
        moved.add_argument("--why", default="", help="kept in the line's history")
        moved.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
        moved.set_defaults(run=run_it)

    export = commands.add_parser("export", help="a verified copy of a drafter, in the layout that engines load")
    export.add_argument("version", metavar="NAME[@VERSION]", help="left out: the champion")
    export.add_argument("folder", metavar="FOLDER", type=Path)
    export.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    export.set_defaults(run=_export)

    evaluate = commands.add_parser("evaluate", help="compare drafters on a config's held-out prompts, training none")
    evaluate.add_argument("drafters", metavar="DRAFTER", nargs="+", help="folder, hub id or NAME@champion")
    _add_run_options(evaluate)
    evaluate.set_defaults(run=_evaluate)

    diagnose = commands.add_parser("diagnose", help="why a running server accepts less than replay says")
    diagnose.add_argument("--url", required=True, help="of the SGLang server, such as http://localhost:30000")
    diagnose.add_argument("--api-key-env", metavar="NAME", help="variable of the environment with the server's API key")
    diagnose.add_argument("--drafter", required=True, help="what it should serve: a folder, or NAME@champion")
    diagnose.add_argument("--prompts", type=int, help="how many it is asked (default: 16)")
    _add_run_options(diagnose)
    diagnose.set_defaults(run=_diagnose)

    deploy = commands.add_parser("deploy", help="a deployment of a config on a Prefect server: schedule, pool, webhook")
    _add_config(deploy)
    deploy.add_argument("--pool", required=True, help="work pool whose workers run it; it must exist")
    deploy.add_argument("--cron", help="when, such as '0 3 * * 1': Mondays at 3; left out: only when asked to")
    deploy.add_argument("--timezone", default="UTC", help="of --cron, such as Europe/Berlin (default: UTC)")
    deploy.add_argument(
        "--force", action="append", default=[], metavar="NODE", help="every run makes this node again, such as target"
    )
    deploy.add_argument("--webhook", metavar="URL", help="called when a run fails, crashes, promotes or is refused")
    deploy.set_defaults(run=_deploy)

    prune = commands.add_parser("prune", help="what was left behind: old unfinished attempts, replaced artifacts, logs")
    prune.add_argument("--days", type=float, default=30, help="only what was not touched for so long (default: 30)")
    prune.add_argument("--delete", action="store_true", help="delete it; without, it is only listed")
    prune.set_defaults(run=_prune)
    return parser


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    parser.add_argument(
        "--force", action="append", default=[], metavar="NODE", help="make this node again although it is there"
    )
    parser.add_argument(
        "--from",
        action="append",
        default=[],
        dest="start",
        metavar="NODE",
        help="begin at this node: all but it and what is behind it must be in the store",
    )
    parser.add_argument(
        "--until", action="append", default=[], metavar="NODE", help="make only this node and what it needs"
    )
    parser.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")


def _add_config(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    parser.add_argument(
        "config", metavar="CONFIG", type=Path, nargs="?" if optional else None, help="YAML file of the run"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="FIELD=VALUE",
        help="change a field: sft.steps=200",
    )


# -- commands --------------------------------------------------------------------------------------------------------


def _run(options: argparse.Namespace, pipeline: Pipeline) -> None:
    """Run the config's flow and print what it found, or only print the plan."""
    _run_config(options, pipeline, _read(options, pipeline))


def _evaluate(options: argparse.Namespace, pipeline: Pipeline) -> None:
    from draftsmith.flows.refresh.config import RefreshConfig
    from draftsmith.flows.refresh.evaluate import EVALUATE, evaluate_config

    config = _read(options, pipeline)
    if not isinstance(config, RefreshConfig):
        raise DraftsmithError(f"{options.config} describes an experiment: give the config of a refresh")
    _run_config(options, EVALUATE, evaluate_config(config, options.drafters))


def _diagnose(options: argparse.Namespace, pipeline: Pipeline) -> None:
    from draftsmith.flows.refresh.config import RefreshConfig
    from draftsmith.flows.refresh.diagnose import DIAGNOSE, NODE, diagnose_config

    config = _read(options, pipeline)
    if not isinstance(config, RefreshConfig):
        raise DraftsmithError(f"{options.config} describes an experiment: give the config of a refresh")
    options.force = [*options.force, NODE]  # what a server does is not known from before
    asked = diagnose_config(config, options.url, options.drafter, options.prompts, options.api_key_env)
    _run_config(options, DIAGNOSE, asked)


def _run_config(options: argparse.Namespace, pipeline: Pipeline, config: RunOptions) -> None:
    from draftsmith.artifacts.store import Store
    from draftsmith.artifacts.tracking import Tracking
    from draftsmith.flows.pipeline.display import Display
    from draftsmith.flows.pipeline.machine import check_home
    from draftsmith.flows.pipeline.part import Part
    from draftsmith.flows.pipeline.patience import patiently
    from draftsmith.flows.pipeline.prefect_server import start_prefect_server

    display, tracking = Display(), Tracking(home(), config.experiment)
    store, part = Store(home() / "store"), Part.of(options.start, options.until)
    planned = patiently(lambda: part.plan(config, store, pipeline, options.force), config.stages, display.line)
    display.plan(planned)
    if options.plan:
        return
    check_home(home(), config)
    server = start_prefect_server(home())
    patiently(tracking.check, config.stages, display.line)  # while the server starts
    flow = _named(pipeline.flow)
    patiently(server.wait, config.stages, display.line)
    from draftsmith.flows.pipeline.delivery import run_flow  # imports httpx, as the flow does

    def lost(what: str) -> None:
        display.line(f"warning: {what}")
        options.lost_prefect = server

    refused: RefusedError | None = None
    try:
        made = run_flow(flow, config, lost, force=options.force, start=options.start, until=options.until)
    except RefusedError as error:
        refused, made = error, getattr(error, "made", {})
    folders = {name: Path(each["path"]) for name, each in made.items()}
    if options.until:
        for name, folder in folders.items():
            display.line(f"{name}: {folder}")
    elif made and pipeline.results:
        _named(pipeline.results)(display, folders, tracking.ui_command)
    if refused is not None:
        raise refused


def _named(text: str) -> Any:
    """What `module:attribute` names."""
    module, _, attribute = text.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _check(options: argparse.Namespace, pipeline: Pipeline) -> None:
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # read when the library is imported
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from draftsmith.flows.checks.check import check
    from draftsmith.flows.checks.findings import show
    from draftsmith.flows.pipeline.display import Display

    config = _read(options, pipeline)
    found = check(config, pipeline, home())
    show(Display(), found.lines)
    if found.errors:
        raise DraftsmithError(
            f"{found.errors} of {len(found.lines)} checks failed: {options.config} cannot run like this"
        )


def _stage(options: argparse.Namespace, pipeline: Pipeline) -> None:
    from draftsmith.artifacts.store import Store
    from draftsmith.artifacts.tracking import Tracking
    from draftsmith.flows.checks.check import check_alone
    from draftsmith.flows.pipeline.display import Display
    from draftsmith.flows.pipeline.graph import plan
    from draftsmith.flows.pipeline.machine import check_home
    from draftsmith.flows.pipeline.node import Workshop, make
    from draftsmith.flows.pipeline.patience import patiently

    config = _read(options, pipeline)
    # a damaged artifact is no matter unless it is needed: it may be the one that is to be made again
    items = plan(config, Store(home() / "store"), pipeline, stop_at_damage=False)
    planned = {item.node.name: item for item in items}
    if options.name not in planned:
        raise DraftsmithError(f"no node {options.name!r}: use one of {', '.join(planned)}")
    node = planned[options.name].node
    inputs = {}
    for name, source in node.inputs.items():
        ref = planned[source].ref
        if (damage := planned[source].damage) is not None:
            raise damage
        if ref is None:
            raise DraftsmithError(_missing_input(options, name, planned[source]))
        inputs[name] = ref
    check_home(home(), config)
    display, tracking = Display(), Tracking(home(), config.experiment)
    for warning in check_alone(node, {name: ref.path for name, ref in inputs.items()}):
        display.line(f"warning: {warning}")
    patiently(tracking.check, config.stages, display.line)
    workshop = Workshop(home(), config, pipeline, display, tracking)
    made = patiently(lambda: make(workshop, node, inputs, force=options.force), config.stages, display.line)
    display.line(f"{node.name}: {made.ref.path}")


def _missing_input(options: argparse.Namespace, name: str, source: PlannedNode) -> str:
    from draftsmith.flows.pipeline.graph import Status

    rest = [str(options.config), *(word for override in options.overrides for word in ("--set", override))]
    made_alone = source.status is not Status.AFTER  # else its own inputs are missing too
    command = ["draftsmith", "stage", source.node.name, *rest] if made_alone else ["draftsmith", "run", *rest]
    return (
        f"stage {options.name}: its input {name!r} (node {source.node.name}) is not in the store: make it with "
        f"`{shlex.join(command)}`"
    )


def _why(options: argparse.Namespace, pipeline: Pipeline) -> None:
    from draftsmith.flows.pipeline.display import Display
    from draftsmith.flows.pipeline.why import why

    why(Display(), _read(options, pipeline), pipeline, options.name)


def _status(options: argparse.Namespace, pipeline: Pipeline) -> None:
    from draftsmith.flows.pipeline import inspection
    from draftsmith.flows.pipeline.display import Display

    if options.config is None:
        inspection.status_of_store(Display())
    else:
        inspection.status_of_config(Display(), _read(options, pipeline), pipeline)


def _show(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    from draftsmith.flows.pipeline import inspection
    from draftsmith.flows.pipeline.display import Display

    inspection.show(Display(), options.artifact, verify=options.verify)


def _report(options: argparse.Namespace, pipeline: Pipeline) -> None:
    from draftsmith.flows.pipeline.display import Display
    from draftsmith.flows.refresh import comparison

    comparison.report(Display(), options.refreshes, pipeline, in_browser=options.open)


def _champions(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    from draftsmith.flows.pipeline.display import Display
    from draftsmith.flows.refresh import commands

    commands.champions(Display(), options.line)


def _promote(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    from draftsmith.flows.pipeline.display import Display
    from draftsmith.flows.refresh import commands

    commands.promote(Display(), options.version, options.why, dry_run=options.dry_run)


def _rollback(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    from draftsmith.flows.pipeline.display import Display
    from draftsmith.flows.refresh import commands

    commands.rollback(Display(), options.line, options.why, dry_run=options.dry_run)


def _export(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    from draftsmith.flows.pipeline.display import Display
    from draftsmith.flows.refresh import commands

    commands.export(Display(), options.version, options.folder, dry_run=options.dry_run)


def _deploy(options: argparse.Namespace, pipeline: Pipeline) -> None:
    from draftsmith.artifacts.home import home
    from draftsmith.flows.pipeline.config_file import read_config
    from draftsmith.flows.pipeline.display import Display
    from draftsmith.flows.pipeline.graph import forced_nodes
    from draftsmith.flows.pipeline.prefect_server import lasting_server

    config = read_config(options.config, options.overrides, pipeline.config)
    forced_nodes(pipeline.nodes(config), options.force)  # said here, not when it runs at night
    api = lasting_server(home())
    from draftsmith.flows.pipeline.deployment import Schedule, deploy

    schedule = Schedule(options.cron, options.timezone)
    made = deploy(
        config,
        pipeline,
        api,
        pool=options.pool,
        schedule=schedule,
        force=options.force,
        webhook=options.webhook,
        folder=Path.cwd(),
    )
    when = f"{options.cron} ({options.timezone})" if options.cron else "when it is asked to"
    Display().line(f"{made.name}: in work pool {options.pool}, {when}: {made.url}")


def _prune(options: argparse.Namespace, _pipeline: Pipeline) -> None:
    from draftsmith.flows.pipeline import inspection
    from draftsmith.flows.pipeline.display import Display

    inspection.prune(Display(), options.days, delete=options.delete)


def _read(options: argparse.Namespace, pipeline: Pipeline) -> RunOptions:
    """The config, with what only the outside knows."""
    from draftsmith.flows.pipeline.config_file import read_config
    from draftsmith.flows.pipeline.graph import resolved

    return resolved(read_config(options.config, options.overrides, pipeline.config), pipeline)


if __name__ == "__main__":
    sys.exit(main())
