"""Toy stage `squares`: the squares of the first numbers, in one piece or in shards."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

from draftsmith.stages.runtime.stage import WHOLE, Compute, Config, Shard, Stage, StageContext


class SquaresConfig(Config):
    numbers: int = 7
    note_start: Path | None = None  # a line is added here by every process
    die: Path | None = None  # while this file exists, the second shard is killed


def shard(context: StageContext, config: SquaresConfig, part: Shard) -> None:
    _note(config, f"{part.index + 1} of {part.of}, device {os.environ.get('CUDA_VISIBLE_DEVICES', 'any')}")
    if part.index == 1 and config.die is not None and config.die.exists():
        os.kill(os.getpid(), signal.SIGKILL)
    _write(context, {n: n * n for n in range(config.numbers) if part.contains(n)})


def run(context: StageContext, config: SquaresConfig) -> None:
    _note(config, "joined" if context.shards else "whole")
    squares: dict[int, int] = {}
    for folder in context.shards:
        squares |= {int(n): square for n, square in json.loads((folder / "squares.json").read_text()).items()}
    _write(context, squares or {n: n * n for n in range(config.numbers) if WHOLE.contains(n)})


def _write(context: StageContext, squares: dict[int, int]) -> None:
    context.progress(len(squares), len(squares), "numbers")
    (context.out / "squares.json").write_text(json.dumps(dict(sorted(squares.items()))))
    context.summary(numbers=len(squares))


def _note(config: SquaresConfig, line: str) -> None:
    if config.note_start is not None:
        with config.note_start.open("a") as stream:
            stream.write(f"{line}\n")


STAGE = Stage(
    name="squares",
    config=SquaresConfig,
    inputs=("first",),
    body=__name__,
    compute=Compute.HEAVY,
    sharded=True,
    join_compute=Compute.LIGHT,
)
