"""Runs five weeks of a model line on the test bed's small target, with the real command: `make season`.

Week 1 has no champion. In week 2 nothing has changed. In week 3 other prompts arrive. Week 4 is a broken refresh with
far too high a learning rate. In week 5 the target has another revision. Then the line is rolled back. Every week uses
the same config file with one or two fields changed, as a team would change them.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from draftsmith.artifacts.errors import RefusedError
from draftsmith.artifacts.results.evaluation import DriftResult
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.artifacts.store.local import Store
from tests.flows.processes import ROOT, environment
from tests.testbed.refresh import small_refresh
from tests.testbed.target import prompts_file, revision_folder, target_folder

LINE = "tiny-dflash"


@dataclass(frozen=True)
class Size:
    """Lengths of the season's trainings and measurements."""

    train: int = 120
    heldout: int = 40
    sft_steps: int = 300
    opd_steps: int = 60
    rounds: int = 2
    speed_prompts: int = 20
    judge_speed: bool = True
    control: bool = True  # SFT continued as an arm


FULL = Size()
SHORT = Size(
    train=48, heldout=24, sft_steps=120, opd_steps=16, rounds=1, speed_prompts=4, judge_speed=False, control=False
)


@dataclass(frozen=True)
class Week:
    """The expected outcome of a week, and the actual one."""

    name: str
    expected: str  # promoted, skipped, refused
    happened: str  # one of these, inconclusive, or failed with its exit code
    seconds: float
    reason: str  # from the gate or the drift check
    output: str
    stderr: str

    def __str__(self) -> str:
        return f"{self.name:<40} {self.happened:<12} {self.seconds:4.0f} s  {self.reason}"


def config_of(size: Size) -> dict[str, Any]:
    """Return the config of the first week."""
    records = {"kind": "jsonl", "path": str(prompts_file()), "label": "record", "filter": {"family": "record"}}
    training = {"sequences_per_step": 6}
    return small_refresh(
        "season", target_folder(), prompts_file(), 40,
        registry={"name": LINE},
        prompts={
            "sources": [records], "train": size.train, "validation": 8, "heldout": size.heldout,
            "heldout_share": 0.3,  # of 200 rows of a family
        },
        rollout={"prompts": size.train - 16, "engine": {"slots": 32}},
        sft={**training, "steps": size.sft_steps, "gamma": 4.0},
        assisted={"skip": size.train - 16, "engine": {"slots": 16}},
        opd={**training, "steps": size.opd_steps, "learning_rate": 1e-3},
        heldout={"engine": {"slots": 16}},
        evaluation={
            "speed_prompts": size.speed_prompts, "validation_prompts": 4, "block_sizes": [6], "exactness_prompts": 4,
            "rounds": size.rounds,
        },
        # with a target as small as this, drafting takes as long as a step of the target: tau 2.7 gains no time yet, and
        # 0.5 is far below what noise reaches
        gate={"judge_speed": size.judge_speed, "min_speedup": 0.5},
        refresh={"control": size.control},
    )  # fmt: skip


def play(folder: Path, size: Size) -> Iterator[Week]:
    """Run the weeks, and yield each with its result. folder: for the home and the config."""
    config, home = folder / "season.yaml", folder / "home"
    config.write_text(yaml.safe_dump(config_of(size)))
    broken = ["sft.learning_rate=0.5", "opd.learning_rate=0.5"]
    other = ["prompts.sources.0.filter={family: story}", "prompts.sources.0.label=story"]
    weeks: list[tuple[str, str, list[str]]] = [
        ("week 1: no champion", "promoted", []),
        ("week 2: nothing changed", "skipped", []),
        ("week 3: other traffic", "promoted", other),
        ("week 4: a broken refresh", "refused", [*other, *broken]),
        ("week 5: the target has a new revision", "promoted", [*other, f"target.source={revision_folder()}"]),
    ]
    # trained where the tests run: a drafter that was trained for other prompts and another revision is far worse than
    # one for these, whatever the weights are; and no first drafter is refused
    if size is SHORT:  # the gate refuses for its threshold, and then takes the same drafter
        weeks[0] = (*weeks[0][:2], ["refresh.control=true"])
        revised = weeks[4][2]
        weeks[2:] = [
            ("week 3: a gate that wants more", "refused", [*revised, "gate.min_tau_gain=9"]),
            ("week 4: the target has a new revision", "promoted", revised),
        ]
    for name, expected, changed in weeks:
        force = ["--force", "drift"] if changed[-2:] == broken else []
        start, before = time.monotonic(), last(home, "gate")
        process = draftsmith(home, "run", config, *(word for each in changed for word in ("--set", each)), *force)
        happened, reason = outcome(home, process, decided=last(home, "gate") != before)
        seconds, output = time.monotonic() - start, process.stdout + process.stderr
        yield Week(name, expected, happened, seconds, reason, output, process.stderr)


def last(home: Path, stage: str) -> Path | None:
    """Return the newest artifact of a stage."""
    manifests = [manifest for manifest in Store(home / "store").list() if manifest.stage == stage]
    return Store(home / "store").path(stage, manifests[-1].key) if manifests else None


def outcome(home: Path, process: subprocess.CompletedProcess[str], *, decided: bool) -> tuple[str, str]:
    """Return the outcome of a refresh and its reason. decided: whether it ran its gate."""
    if process.returncode not in (0, RefusedError.exit_code):
        return f"failed ({process.returncode})", (process.stderr.strip().splitlines() or ["nothing"])[-1]
    if decided and (gate := last(home, "gate")) is not None:
        decision = GateDecision.read(gate)
        return decision.outcome, decision.sentence.partition(": ")[2]
    drift = last(home, "drift")
    assert drift is not None
    return "skipped", f"the champion is current: tau {DriftResult.read(drift).overall.tau:.3f}"


def draftsmith(home: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a home."""
    return subprocess.run(
        [sys.executable, "-m", "draftsmith.flows", *map(str, arguments)],
        cwd=ROOT,
        env=environment(home, OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Five weeks of a model line, in minutes.")
    parser.add_argument("--short", action="store_true", help="four weeks, shorter trainings, no speed rules")
    parser.add_argument("--folder", type=Path, help="for home and config; by default a temporary one")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="draftsmith-season-") as temporary:
        folder = (options.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        unexpected = 0
        for week in play(folder, SHORT if options.short else FULL):
            print(week, flush=True)
            if week.happened != week.expected:
                unexpected += 1
                print(f"expected: {week.expected}\n{week.output}", file=sys.stderr)
        rolled = draftsmith(folder / "home", "rollback", LINE, "--why", "end of the season")
        print(f"{'then: rollback':<40} {(rolled.stdout + rolled.stderr).strip()}")
        print(draftsmith(folder / "home", "champions", LINE).stdout)
    return 1 if unexpected or rolled.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
