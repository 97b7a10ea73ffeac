"""The command `python -m tests.faults.run`: injects every fault into every stage, at seeded random moments.

Each fault adds a row to a file of JSON lines, from which the same command continues. A table comes at the end.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from draftsmith.flows.execution.display import format_duration
from tests.faults.catalogue import faults
from tests.faults.configs import NODES
from tests.faults.home import SERVER
from tests.faults.play import Case, Row, play, play_in_turn
from tests.faults.proxy import SERVERS
from tests.faults.servers import prefect_server
from tests.faults.undisturbed import undisturbed

_MOUNTED = "FAULTS_MAY_MOUNT"


def cases(seed: int, only: Sequence[str] = ()) -> list[Case]:
    """Return every fault at every node that it can meet, in a seeded order.

    only: patterns of `FAULT` or `FAULT/NODE`.
    """
    all_cases = [
        Case(fault, kind, node)
        for fault in faults()
        for kind, nodes in NODES.items()
        for node in nodes
        if kind in fault.kinds and node in fault.nodes
    ]
    random.Random(seed).shuffle(all_cases)
    return _broad([case for case in all_cases if not only or any(_matches(case, pattern) for pattern in only)])


def _broad(cases: Sequence[Case]) -> list[Case]:
    """Return the cases in rounds: every fault once, then each at another node, and so on."""
    before: Counter[str] = Counter()
    rounds = []
    for case in cases:
        rounds.append(before[case.fault.name])
        before[case.fault.name] += 1
    return [case for _, case in sorted(zip(rounds, cases, strict=True), key=lambda pair: pair[0])]


def _matches(case: Case, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (case.fault.name, f"{case.fault.name}/{case.node}"))


def series(seed: int, runs: int, only: Sequence[str]) -> Iterator[Case]:
    """Yield this many cases (0: all). After each has come once, they come again at other moments."""
    chosen = cases(seed, only)
    if not chosen:
        raise SystemExit("no fault matches")
    for number in range(runs or len(chosen)):
        case = chosen[number % len(chosen)]
        yield Case(case.fault, case.kind, case.node, number // len(chosen))


def read_rows(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [Row(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]


def write_rows(path: Path, rows: Sequence[Row], mode: str = "a") -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(asdict(row)) + "\n" for row in rows)


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table without the nodes that no fault has met.

    A cell has the number of runs that ended well, and of all runs if some did not.
    """
    met = {row.node for row in rows}
    nodes = list(dict.fromkeys(node for of_kind in NODES.values() for node in of_kind if node in met))
    head = ["fault", *nodes, "all"]
    lines = [head, ["---"] * len(head)]
    for name in sorted({row.fault for row in rows}):
        mine = [row for row in rows if row.fault == name]
        cells = [[row for row in mine if row.node == node] for node in nodes]
        lines.append([name, *(_cell(cell) for cell in [*cells, mine])])
    broken = [f"- {r.fault}, {r.node} ({r.point}): {r.outcome}" for r in rows if r.outcome != "ok"]
    counts = f"{len(rows)} runs, {len(rows) - len(broken)} ended well"
    return "\n".join([*(f"| {' | '.join(line)} |" for line in lines), "", *broken, counts])


def _cell(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    well = sum(row.outcome == "ok" for row in rows)
    return str(well) if well == len(rows) else f"{well} of {len(rows)}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Inject faults into real refreshes on a tiny target.")
    parser.add_argument("--seed", type=int, default=0, help="of the faults' order and moments")
    parser.add_argument("--runs", type=int, default=0, help="how many faults; 0: each at every stage, once")
    parser.add_argument("--only", action="append", default=[], metavar="PATTERN", help="such as 'SIG*/opd'")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "draftsmith-faults")
    parser.add_argument("--server", action="store_true", help="one Prefect server for all commands, as a team has it")
    parser.add_argument("--again", action="store_true", help="play the failed ones again")
    parser.add_argument("--table", action="store_true", help="print the table of what was played, and play nothing")
    options = parser.parse_args()
    rows_file = options.folder / "rows.jsonl"
    rows = [row for row in read_rows(rows_file) if not (options.again and row.outcome != "ok")]
    if not options.table:
        _in_mounts_of_our_own()
        options.folder.mkdir(parents=True, exist_ok=True)
        write_rows(rows_file, rows, "w")
        played = {(row.fault, row.node, row.number) for row in rows if row.seed == options.seed}
        todo = [case for case in series(options.seed, options.runs, options.only) if case.name not in played]
        with SERVERS:
            if options.server:
                os.environ[SERVER] = f"{SERVERS.enter_context(prefect_server(options.folder)).url}/api"
            rows += _record(_play_all(todo, options.seed, options.folder), len(todo), rows_file)
    print(table(rows))
    return 1 if any(row.outcome != "ok" for row in rows) else 0


def _play_all(todo: Sequence[Case], seed: int, folder: Path) -> Iterator[Row]:
    """Play the cases. Those that can follow each other on one attempt are played together."""
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in todo:
        together = (case.kind, case.node, case.number)
        groups.setdefault(together if case.fault.strike else case.name, []).append(case)
    for kind in dict.fromkeys(case.kind for case in sorted(todo, key=lambda case: list(NODES).index(case.kind))):
        calm = undisturbed(kind, folder)
        for cases in (group for group in groups.values() if group[0].kind == kind):
            yield from play_in_turn(cases, seed, calm) if cases[0].fault.strike else [play(cases[0], seed, calm)]


def _record(rows: Iterator[Row], total: int, path: Path) -> Iterator[Row]:
    """Store, print and yield each row, with the rate and the time left."""
    started = time.monotonic()
    for done, row in enumerate(rows, start=1):
        write_rows(path, [row])
        each_s = (time.monotonic() - started) / done
        left = f"{each_s:.0f} s a fault, {format_duration(each_s * (total - done))} left"
        line = f"{row.node:<10} {row.fault:<38} {row.point:<17} {row.seconds:5.1f} s  {row.outcome}"
        print(f"{done}/{total}  {line}  ({left})", flush=True)
        yield row


def _in_mounts_of_our_own() -> None:
    """Continue in a mount namespace that ends with this process, if that is allowed; disks are mounted there."""
    if _MOUNTED in os.environ or shutil.which("unshare") is None:
        return
    for prefix in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        if subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            os.environ[_MOUNTED] = "1"
            command = [*prefix, sys.executable, "-m", "tests.faults.run", *sys.argv[1:]]
            os.execvp(command[0], command)


if __name__ == "__main__":
    sys.exit(main())
