"""Toy stage `misbehave`: fails or behaves oddly in the way that its config names."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Literal

from draftsmith.stages.runtime.stage import Config, Stage, StageContext

Way = Literal[
    "raise", "quote", "full-disk", "print", "ignore-sigterm", "kill-itself", "exit", "threads", "rewind", "nan"
]


class MisbehaveConfig(Config):
    way: Way


def run(context: StageContext, config: MisbehaveConfig) -> None:
    match config.way:
        case "raise":
            raise ValueError("the matrix\nis singular")
        case "quote":
            raise ValueError("a field is named \ud83d\x1b[2J")
        case "full-disk":
            Path("/dev/full").write_text("x")
        case "print":
            print("a library that prints")
            sys.stdout.flush()
            os.write(1, b"native code that prints\n")
        case "ignore-sigterm":
            while True:
                context.progress(0, 1, "sleeps")
                time.sleep(0.1)
        case "kill-itself":
            os.kill(os.getpid(), 9)
        case "exit":
            os._exit(3)
        case "threads":
            context.summary(threads=int(os.environ["OMP_NUM_THREADS"]))
        case "nan":
            context.summary(tau=float("nan"), speedup=float("inf"), steps=3)
        case "rewind":
            for step in range(4):
                context.metrics(step, loss=step)
            with (context.out / "metrics.jsonl").open("a") as stream:
                stream.write('{"step": 1, "lo')  # killed in the middle of a line
            context.rewind_metrics(2)
            context.metrics(2, loss=20.0)


STAGE = Stage(name="misbehave", config=MisbehaveConfig, inputs=(), body=__name__)
