"""The entry point of the `draftsmith` command: signals, exit codes, and errors as one line."""

from __future__ import annotations

import argparse
import logging
import math
import os
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from draftsmith.artifacts.errors import EXIT_INTERRUPTED, DraftsmithError, RefusedError, from_os_error, one_line
from draftsmith.artifacts.home import home, home_umask
from draftsmith.artifacts.host import GPU_MODELS, bypass_proxy_for_localhost
from draftsmith.artifacts.redaction import redact_logs, shown, shown_traceback
from draftsmith.stages.runtime.memory import relax_gc

if TYPE_CHECKING:
    from draftsmith.flows.planning.plan import Pipeline

_DESCRIPTION = "Keep the draft model of speculative decoding matched to its target."
_EPILOG = (
    "All data is kept under DRAFTSMITH_HOME (by default .draftsmith in the current folder). PREFECT_API_URL and "
    "MLFLOW_TRACKING_URI select existing servers. DRAFTSMITH_DEBUG=1 shows tracebacks."
)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    main = argparse.ArgumentParser(prog="draftsmith", description=_DESCRIPTION, epilog=_EPILOG)
    main.add_argument("--version", action="version", version=f"%(prog)s {version('draftsmith')}")
    main.set_defaults(restart=False)
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run the refresh that a file describes, and reuse what has not changed")
    _add_run_options(run)

    check = commands.add_parser("check", help="check a config before anything runs: errors, warnings, memory, time")
    _add_config(check)
    check.add_argument(
        "--gpu",
        choices=list(GPU_MODELS),
        help="estimate memory and time for GPUs of this kind, not for this machine",
    )

    init = commands.add_parser("init", help="write a first config from a few answers, and check it")
    init.add_argument("file", metavar="FILE", type=Path, help="the YAML file to write; it must not exist")
    init.add_argument(
        "--from",
        dest="beginning",
        choices=["prompts", "logs"],
        help="your own prompts, or answers that your target gave in production (default: ask)",
    )
    init.add_argument(
        "--size",
        choices=["laptop", "gpu", "node"],
        help="a CPU, one GPU, or 8 GPUs with SGLang servers (default: what this machine has)",
    )
    init.add_argument(
        "--training",
        choices=["opd", "sft"],
        help="SFT and then OPD, or SFT alone, which leaves out stages. Left out: asked for; opd in a script",
    )
    for option in ("--target", "--prompts", "--logs", "--temperature"):
        init.add_argument(option, metavar="VALUE", help="the answer to this question, for scripts")

    stage = commands.add_parser("stage", help="run one node, with its inputs from the store")
    stage.add_argument("name", metavar="NODE", help="the node, as in `draftsmith run --plan`")
    _add_config(stage)
    stage.add_argument("--force", action="store_true", help="make it again although the store has it")

    why = commands.add_parser("why", help="explain why a node's cache key is new: fields, inputs, files, code")
    _add_config(why)
    why.add_argument("name", metavar="NODE", help="the node, as in `draftsmith run --plan`")

    status = commands.add_parser(
        "status", help="show the page of a model line; or what is done, unfinished, running or failed"
    )
    _add_config(status, "NAME", "a model line, whose servers are queried, or a run's YAML file", optional=True)
    _add_servers(status)

    show = commands.add_parser("show", help="show an artifact: its files and what it is made from")
    show.add_argument("artifact", metavar="ARTIFACT", help="a stage, the start of a key or content id, or a path")
    show.add_argument("--verify", action="store_true", help="compare every file with its checksum")

    report = commands.add_parser("report", help="print where a refresh's report is")
    report.add_argument(
        "refresh",
        metavar="REFRESH",
        help="a config file, a version such as smollm2@3, a refresh's run in MLflow (name or id), an artifact",
    )
    report.add_argument("--open", action="store_true", help="show the page in the browser")

    champions = commands.add_parser("champions", help="show a model line: which version serves, since when and why")
    champions.add_argument(
        "line", metavar="NAME", nargs="?", help="as in registry.name of a config; by default all lines"
    )

    diff = commands.add_parser("diff", help="compare two versions: gate, data, tau by slice, speed, config")
    diff.add_argument("first", metavar="NAME@VERSION", help="such as smollm2@1 or smollm2@champion")
    diff.add_argument("second", metavar="NAME@VERSION")

    promote = commands.add_parser("promote", help="make a version of a line the champion")
    promote.add_argument("version", metavar="NAME@VERSION", help="such as smollm2@3 or smollm2@challenger")
    rollback = commands.add_parser("rollback", help="make the previous champion the champion again")
    rollback.add_argument("line", metavar="NAME")
    for moved in (promote, rollback):
        moved.add_argument("--why", default="", help="the reason, kept in the line's history")
        moved.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
        _add_servers(moved)

    watch = commands.add_parser("watch", help="compare tau of a line's servers with the champion's at its promotion")
    _add_config(watch, "NAME", "YAML file of a line's refresh, or the line's name", restart=False)
    _add_servers(watch)
    watch.add_argument(
        "--minutes",
        type=_number,
        default=5,
        help="count requests that finish within MINUTES minutes, unless all servers trace them (default: 5)",
    )
    watch.add_argument(
        "--then",
        choices=["refresh", "rollback"],
        help="if tau is measurably below: run the config's refresh, or roll the line back",
    )
    watch.set_defaults(force=[], start=[], until=[], plan=False)  # options of the refresh
    swap = commands.add_parser("swap", help="have running servers draft with a version, and prove that they do")
    swap.add_argument("version", metavar="NAME[@VERSION]", help="by default the champion")
    _add_servers(swap)
    swap.add_argument(
        "--forget", action="append", default=[], metavar="URL", help="drop a server that is gone; nothing is swapped"
    )

    export = commands.add_parser("export", help="copy a verified drafter, in the layout that engines load")
    export.add_argument("version", metavar="NAME[@VERSION]", help="by default the champion")
    export.add_argument("folder", metavar="FOLDER", type=Path)
    export.add_argument(
        "--format",
        choices=["sglang", "speculators", "stitched"],
        default="sglang",
        help="speculators: what vLLM loads, with the target's embedding and head; no EAGLE-3. stitched: the target's "
        "checkpoint with this native head in it",
    )
    export.add_argument(
        "--calibrated",
        action="store_true",
        help="correct a DSpark's confidence head as the evaluation measured. On an SGLang server `status` and `watch` "
        "do not recognise the copy; `swap` writes versions as they were trained",
    )

    evaluate = commands.add_parser("evaluate", help="compare drafters on a config's held-out prompts, without training")
    evaluate.add_argument("drafters", metavar="DRAFTER", nargs="+", help="folder, hub id or NAME@champion")
    _add_run_options(evaluate)

    diagnose = commands.add_parser("diagnose", help="explain why a running server accepts less than replay predicts")
    diagnose.add_argument(
        "--url", required=True, help="address of the SGLang or vLLM server, such as http://localhost:30000"
    )
    diagnose.add_argument("--api-key-env", metavar="NAME", help="environment variable with the server's API key")
    diagnose.add_argument("--drafter", required=True, help="the drafter it should serve: a folder, or NAME@champion")
    diagnose.add_argument("--prompts", type=_positive, help="number of prompts to send (default: 16)")
    _add_run_options(diagnose)
    diagnose.set_defaults(force=["diagnosis"])  # the server may answer differently from last time

    deploy = commands.add_parser("deploy", help="deploy a config on a Prefect server: schedule, pool")
    _add_config(deploy, restart=False)
    deploy.add_argument("--pool", required=True, help="an existing work pool, whose workers run it")
    deploy.add_argument("--cron", help="schedule, such as '0 3 * * 1': Mondays at 3 (default: only on request)")
    deploy.add_argument("--timezone", default="UTC", help="time zone of --cron, such as Europe/Berlin (default: UTC)")
    _add_selection(deploy)
    deploy.add_argument(
        "--watch",
        choices=["report", "refresh", "rollback"],
        help="deploy a watch of the servers: if tau is measurably below, report it, run the refresh, or roll back",
    )

    prune = commands.add_parser("prune", help="remove old leftovers: unfinished attempts, replaced artifacts, logs")
    prune.add_argument("--days", type=_number, default=30, help="only what was untouched for DAYS days (default: 30)")
    prune.add_argument(
        "--artifacts",
        action="store_true",
        help="also complete artifacts that no run used since and no line needs",
    )
    prune.add_argument("--delete", action="store_true", help="delete them; without it they are only listed")
    return main


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    _add_config(parser)
    _add_selection(parser)
    parser.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")


def _add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--force", action="append", default=[], metavar="NODE", help="make this node again although the store has it"
    )
    parser.add_argument(
        "--from",
        action="append",
        default=[],
        dest="start",
        metavar="NODE",
        help="make this node and what follows from it; all else must be in the store",
    )
    parser.add_argument(
        "--until", action="append", default=[], metavar="NODE", help="make only this node and what it needs"
    )


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of 1 or more")
    return int(text)


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number of 0 or more")
    return number


def _add_servers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        action="append",
        default=[],
        help="an SGLang or vLLM server; it gets the API key in SGLANG_API_KEY or VLLM_API_KEY, if set (default: the "
        "servers that were swapped, without a key)",
    )


def _add_config(
    parser: argparse.ArgumentParser,
    metavar: str = "CONFIG",
    about: str = "YAML file of the run",
    *,
    optional: bool = False,
    restart: bool = True,
) -> None:
    parser.add_argument("config", metavar=metavar, type=Path, nargs="?" if optional else None, help=about)
    if restart:
        parser.add_argument(
            "--restart",
            action="store_true",
            help="start the model line from section `sft`, even if it has a champion; it must still be beaten",
        )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        dest="overrides",
        metavar="FIELD=VALUE",
        help="change a field: sft.steps=200",
    )


_EXIT_UNEXPECTED = 1
_EXIT_TERMINATED = 128 + signal.SIGTERM
_KEPT = "What was finished or saved is kept."
_AGAIN = "Run the same command again to continue."


def main(arguments: Sequence[str] | None = None, pipeline: Pipeline | None = None) -> int:
    """Run the command and return its exit code.

    arguments: the command line without the program's name, by default the process's. pipeline: the refresh by default.
    """
    options = parser().parse_args(arguments)
    relax_gc()
    code = _run(options, pipeline)
    if "lost_prefect" in options:
        from draftsmith.flows.orchestration.server import leave  # heavy, and a command has imported it

        leave(code)
    return code


def _run(options: argparse.Namespace, pipeline: Pipeline | None) -> int:
    signal.signal(signal.SIGTERM, _terminate)
    redact_logs()
    bypass_proxy_for_localhost()
    _show_warnings()
    try:
        with home_umask(home()):
            from draftsmith.flows.cli.commands import COMMANDS, REFRESH  # heavy: not for help or wrong arguments

            COMMANDS[options.command](options, pipeline or REFRESH)
    except KeyboardInterrupt as stop:
        return _fail(f"interrupted. {_KEPT}", EXIT_INTERRUPTED, stop)
    except SystemExit as ended:
        if ended.code != _EXIT_TERMINATED:
            raise
        return _fail(f"terminated. {_KEPT}", _EXIT_TERMINATED, ended)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # `draftsmith status | head`
        return 0
    except RefusedError as error:  # a decision, not a fault
        return _fail(str(error), error.exit_code, error, prefix="")
    except DraftsmithError as error:
        return _fail(str(error), error.exit_code, error)
    except OSError as error:
        disk = from_os_error(error, "working with")
        return _fail(str(disk), disk.exit_code, error)
    except Exception as error:
        message = f"unexpected {type(error).__name__}: {one_line(error)} (set DRAFTSMITH_DEBUG=1 for the traceback)"
        return _fail(message, _EXIT_UNEXPECTED, error)
    return 0


def _fail(message: str, code: int, error: BaseException, prefix: str = "error: ") -> int:
    """Print the error, then the command that continues a run, if one was noted. Return the exit code."""
    if code in (EXIT_INTERRUPTED, _EXIT_TERMINATED):  # a second signal does not wait for Prefect's last events
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: os._exit(code))
    if os.environ.get("DRAFTSMITH_DEBUG") == "1":
        print(shown_traceback(error), end="", file=sys.stderr)
    commands = [note for note in getattr(error, "__notes__", ()) if note.startswith("draftsmith ")]
    if message.endswith(_KEPT) and not commands:
        message = f"{message} {_AGAIN}"
    print(f"draftsmith: {prefix}{' '.join(shown(message).split())}", file=sys.stderr)
    for command in commands:
        print(shown(command), file=sys.stderr)
    return code


def _terminate(*_: object) -> None:
    raise SystemExit(_EXIT_TERMINATED)


def _show_warnings() -> None:
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.setFormatter(logging.Formatter("draftsmith: %(levelname)s: %(message)s"))
    logging.getLogger("draftsmith").handlers = [handler]


if __name__ == "__main__":
    sys.exit(main())
