"""The arguments of the `draftsmith` command, and its help."""

from __future__ import annotations

import argparse
import math
from importlib.metadata import version
from pathlib import Path

_DESCRIPTION = "Keep the draft model of speculative decoding matched to its target."
_EPILOG = (
    "Everything is kept under DRAFTSMITH_HOME (.draftsmith here by default). PREFECT_API_URL and MLFLOW_TRACKING_URI "
    "switch to existing servers. DRAFTSMITH_DEBUG=1 shows tracebacks."
)


def parser() -> argparse.ArgumentParser:
    """Its results name the command in `does`, whatever it was called by."""
    whole = argparse.ArgumentParser(prog="draftsmith", description=_DESCRIPTION, epilog=_EPILOG)
    whole.add_argument("--version", action="version", version=f"%(prog)s {version('draftsmith')}")
    commands = whole.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser(
        "run",
        aliases=["refresh"],
        help="run the refresh that the file describes; what has not changed is reused",
    )
    _add_run_options(run)
    run.set_defaults(does="run")

    check = commands.add_parser("check", help="everything that can be checked before a run, without loading weights")
    _add_config(check)
    check.set_defaults(does="check")

    init = commands.add_parser("init", help="write a first config from a few answers, and check it")
    init.add_argument("file", metavar="FILE", type=Path, help="the YAML file to write; it must not exist")
    init.add_argument(
        "--from",
        dest="beginning",
        choices=["model", "logs", "drafter", "node"],
        help="own target and prompts; own logs; a drafter of the hub; a node of 8 GPUs (asked for if left out)",
    )
    for option in ("--target", "--prompts", "--logs", "--temperature", "--drafter", "--mask-token"):
        init.add_argument(option, metavar="VALUE", help="the answer to a question, for scripts")
    init.set_defaults(does="init")

    stage = commands.add_parser("stage", help="run one node of the graph, with its inputs taken from the store")
    stage.add_argument("name", metavar="NODE", help="the node, as in `draftsmith run --plan`")
    _add_config(stage)
    stage.add_argument("--force", action="store_true", help="make it again although it is there")
    stage.set_defaults(does="stage")

    why = commands.add_parser("why", help="what makes a node's key new: a field, an input, a file, code")
    _add_config(why)
    why.add_argument("name", metavar="NODE", help="the node, as in `draftsmith run --plan`")
    why.set_defaults(does="why")

    status = commands.add_parser("status", help="what is done, unfinished, running or failed")
    _add_config(status, optional=True)
    status.set_defaults(does="status")

    show = commands.add_parser("show", help="an artifact: where it comes from, its files, a look inside")
    show.add_argument("artifact", metavar="ARTIFACT", help="a stage, the start of a key or content id, or a path")
    show.add_argument("--verify", action="store_true", help="compare every file with its checksum")
    show.set_defaults(does="show")

    report = commands.add_parser("report", help="where a refresh's report is (MLflow compares two)")
    report.add_argument(
        "refresh", metavar="REFRESH", help="a config file, a refresh's run in MLflow (name or id), an artifact"
    )
    report.add_argument("--open", action="store_true", help="show the page in the browser")
    report.set_defaults(does="report")

    champions = commands.add_parser("champions", help="a line of drafters: who serves, since when and why")
    champions.add_argument("line", metavar="NAME", help="as in registry.name of a config")
    champions.set_defaults(does="champions")

    promote = commands.add_parser("promote", help="make a version of a line the champion by hand")
    promote.add_argument("version", metavar="NAME@VERSION", help="such as smollm2@3 or smollm2@challenger")
    rollback = commands.add_parser("rollback", help="let the previous champion serve again")
    rollback.add_argument("line", metavar="NAME")
    for moved, name in ((promote, "promote"), (rollback, "rollback")):
        moved.add_argument("--why", default="", help="kept in the line's history")
        moved.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
        moved.set_defaults(does=name)

    export = commands.add_parser("export", help="a verified copy of a drafter, in the layout that engines load")
    export.add_argument("version", metavar="NAME[@VERSION]", help="left out: the champion")
    export.add_argument("folder", metavar="FOLDER", type=Path)
    export.add_argument(
        "--format",
        choices=["sglang", "speculators"],
        default="sglang",
        help="speculators: what vLLM loads, with the target's embedding and head; no EAGLE-3",
    )
    export.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    export.set_defaults(does="export")

    evaluate = commands.add_parser("evaluate", help="compare drafters on a config's held-out prompts, training none")
    evaluate.add_argument("drafters", metavar="DRAFTER", nargs="+", help="folder, hub id or NAME@champion")
    _add_run_options(evaluate)
    evaluate.set_defaults(does="evaluate")

    diagnose = commands.add_parser("diagnose", help="why a running server accepts less than replay says")
    diagnose.add_argument("--url", required=True, help="of the SGLang server, such as http://localhost:30000")
    diagnose.add_argument("--api-key-env", metavar="NAME", help="variable of the environment with the server's API key")
    diagnose.add_argument("--drafter", required=True, help="what it should serve: a folder, or NAME@champion")
    diagnose.add_argument("--prompts", type=_positive, help="how many it is asked (default: 16)")
    _add_run_options(diagnose)
    diagnose.set_defaults(does="diagnose")

    deploy = commands.add_parser("deploy", help="a deployment of a config on a Prefect server: schedule, pool, webhook")
    _add_config(deploy)
    deploy.add_argument("--pool", required=True, help="work pool whose workers run it; it must exist")
    deploy.add_argument("--cron", help="when, such as '0 3 * * 1': Mondays at 3; left out: only when asked to")
    deploy.add_argument("--timezone", default="UTC", help="of --cron, such as Europe/Berlin (default: UTC)")
    deploy.add_argument(
        "--force", action="append", default=[], metavar="NODE", help="every run makes this node again, such as target"
    )
    deploy.add_argument(
        "--webhook",
        metavar="URL",
        help="called when a run fails, crashes, promotes, is refused or inconclusive, or waits for a person; left out: "
        "the one it has, if any",
    )
    deploy.add_argument(
        "--silent-after", type=_days, metavar="DAYS", help="the webhook is called too when no run has ended for so long"
    )
    deploy.set_defaults(does="deploy")

    prune = commands.add_parser("prune", help="what was left behind: old unfinished attempts, replaced artifacts, logs")
    prune.add_argument("--days", type=_days, default=30, help="only what was not touched for so long (default: 30)")
    prune.add_argument(
        "--artifacts", action="store_true", help="complete artifacts too that no run has used and no line needs"
    )
    prune.add_argument("--delete", action="store_true", help="delete it; without, it is only listed")
    prune.set_defaults(does="prune")
    return whole


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
        help="make this node and what follows from it; all else must be in the store",
    )
    parser.add_argument(
        "--until", action="append", default=[], metavar="NODE", help="make only this node and what it needs"
    )
    parser.add_argument("--plan", action="store_true", help="print what would be done, and do nothing")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a whole number of 1 or more is wanted")
    return int(text)


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = math.nan
    if not 0 <= days < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of 0 or more is wanted")
    return days


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
