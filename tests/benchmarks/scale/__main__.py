"""Peak resident memory and time of every stage's tables, at several numbers of recorded answers.

Answers are made, not generated: as many as asked for, of equal length, with the verify steps of a drafter of tau 4.8
(blocks of 8). Every part runs in a process of its own, in the order in which a refresh runs them, on a target and a
drafter that are as small as they can be. `mined` and `mining` are the two halves of mining: shards group by group, then
the table. 100,000 answers of 4,000 tokens need about 25 GB of disk in `--folder`.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.benchmarks import harness
from tests.benchmarks.scale import parts
from tests.benchmarks.scale.recorded import Recorded, write_models


def measure(part: str, folder: Path, recorded: Recorded) -> dict[str, float]:
    """Seconds and peak bytes of a part, in a process of its own, with one thread."""
    parts.prepare(part, folder, recorded)
    command = [sys.executable, "-m", parts.__name__, part, str(folder), str(recorded.answers), str(recorded.tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"{part} at {recorded.answers} answers: exit code {done.returncode}")
    parts.clean(part, folder)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    options = harness.parser(__doc__)
    options.add_argument("--answers", type=int, nargs="+", default=[1000, 10_000])
    options.add_argument("--tokens", type=int, default=4000, help="of an answer")
    options.add_argument(
        "--parts", nargs="+", choices=parts.PARTS, default=list(parts.PARTS), help="left out: all, in this order"
    )
    options.add_argument("--folder", type=Path, help="where data are made; left out: a temporary folder")
    chosen = options.parse_args()
    harness.set_process(chosen)
    rows: dict[str, list[object]] = {part: [part] for part in chosen.parts}
    figures = []
    for answers in chosen.answers:
        recorded = Recorded(answers, chosen.tokens)
        with tempfile.TemporaryDirectory(prefix="draftsmith-scale-", dir=chosen.folder) as name:
            write_models(Path(name))
            for part in chosen.parts:
                found = measure(part, Path(name), recorded)
                rows[part] += [found["peak_bytes"] / 1e6, found["cpu_seconds"]]
                figures.append({"part": part, "answers": answers, **found})
                free = shutil.disk_usage(name).free / 1e9
                clock = time.strftime("%H:%M:%S")
                print(f"{clock} {answers:,} {part}: {json.dumps(found)}, {free:.0f} GB free", file=sys.stderr)
    columns = ["part", *(f"{unit} at {answers:,}" for answers in chosen.answers for unit in ("MB", "CPU s"))]
    harness.print_table(f"Answers of {chosen.tokens:,} tokens", columns, list(rows.values()))
    harness.report("scale", {"tokens": chosen.tokens, "figures": figures}, chosen)


if __name__ == "__main__":
    harness.run(main)
