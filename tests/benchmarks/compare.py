"""What got slower: ratios of the last `make bench` against those of this machine's baseline.

Compared are ratios of two arms that were measured in alternation, and shares of the matrix product rate of the same
run: what else the machine does moves them less than seconds. More is better in all of them. The first run on a machine
is its baseline, kept in the home: other processors have other ratios.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from tests.benchmarks import harness

TOLERANCE = 0.1  # medians of a few repetitions on a machine of two cores differ by so much
Ratios = dict[str, float]


def _decode(figures: Mapping[str, Any]) -> Ratios:
    from tests.benchmarks.decode import OURS, THEIRS

    arms = {(row["arm"], row["batch"]): row for row in figures["rows"]}
    found: Ratios = {}
    for batch in sorted({batch for _, batch in arms}):
        ours, theirs = arms[OURS, batch], arms[THEIRS, batch]
        for part in ("prefill", "decode"):
            speed = f"{part}_tokens_per_s"
            found[f"{part}, batch {batch}: times generate"] = ours[speed] / theirs[speed]
        found[f"prefill, batch {batch}: share of the matmul rate"] = ours["prefill_share"]
    return found


def _speculative(figures: Mapping[str, Any]) -> Ratios:
    return {f"batch {row['batch']}: share of what its parts allow": row["of_bound"] for row in figures["rows"]}


def _sft_step(figures: Mapping[str, Any]) -> Ratios:
    found: Ratios = {}
    for row in figures["rows"]:
        found[f"{row['step']}: SFT's time of its own"] = 1 / row["times_sft"]
        found[f"{row['step']}: share of the matmul rate"] = row["matmul_share"]
    return found


def _replay(figures: Mapping[str, Any]) -> Ratios:
    return {f"{row['method']}: times one request": row["times_one_request"] for row in figures["rows"]}


RATIOS: dict[str, Callable[[Mapping[str, Any]], Ratios]] = {
    "decode": _decode,
    "speculative": _speculative,
    "sft_step": _sft_step,
    "replay": _replay,
}


def ratios_of(folder: Path) -> tuple[dict[str, Any], Ratios]:
    """The conditions, and every ratio of the JSON files `NAME.json` in a folder. DraftsmithError if one is missing."""
    conditions: dict[str, Any] = {}
    found: Ratios = {}
    for name, ratios in RATIOS.items():
        try:
            figures = json.loads((folder / f"{name}.json").read_text("utf-8"))
            conditions = figures["conditions"]
            found |= {f"{name}: {what}": round(value, 3) for what, value in ratios(figures).items()}
        except (OSError, ValueError, KeyError) as error:
            raise DraftsmithError(f"{folder / name}.json: {error!r}; `make bench` writes it") from error
    return conditions, found


def slower(now: Ratios, before: Ratios, tolerance: float) -> list[str]:
    """What both measured and has lost more than `tolerance` of its ratio, the greatest loss first."""
    lost = {what: now[what] / value for what, value in before.items() if what in now}
    return sorted((what for what, kept in lost.items() if kept < 1 - tolerance), key=lost.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="of the JSON files that `make bench` writes")
    parser.add_argument("--baseline", type=Path, help="left out: DRAFTSMITH_HOME/benchmarks/baseline/ratios.json")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="what a ratio may lose")
    parser.add_argument("--keep", action="store_true", help="make these the baseline in place of what is there")
    options = parser.parse_args()
    baseline = options.baseline or harness.benchmark_folder("baseline") / "ratios.json"
    conditions, now = ratios_of(options.folder)
    if options.keep or not baseline.is_file():
        baseline.write_text(json.dumps({"conditions": conditions, "ratios": now}, indent=2) + "\n", "utf-8")
        print(f"{len(now)} ratios kept in {baseline}: what later runs are compared with")
        return
    kept = json.loads(baseline.read_text("utf-8"))
    rows = [[what, value, now.get(what, "-"), _change(now.get(what), value)] for what, value in kept["ratios"].items()]
    harness.print_table("ratios, more is better", ["", "baseline", "now", "change"], rows)
    for name, then in kept["conditions"].items():
        if then != conditions.get(name):
            print(f"the baseline's {name} is {then}, here it is {conditions.get(name)}")
    lost = slower(now, kept["ratios"], options.tolerance)
    print("\n" + ("slower: " + "; ".join(lost) if lost else f"nothing lost more than {options.tolerance:.0%}"))
    sys.exit(1 if lost else 0)


def _change(now: float | None, before: float) -> str:
    return "-" if now is None else f"{now / before - 1:+.1%}"


if __name__ == "__main__":
    harness.run(main)
