"""Toy stage `collect`: writes numbers one at a time, and resumes from those that an earlier attempt saved."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError, RetryableError
from draftsmith.stages.runtime.stage import INCONCLUSIVE, Compute, Config, Stage, StageContext
from tests.flows.frames import frames_of_ours


class CollectConfig(Config):
    """The numbers to collect, and how to fail."""

    count: int = 5
    seconds_each: float = 0.0
    fail_at: int | None = None  # number of numbers before a user's error, unless the file `allow` exists
    allow: Path | None = None
    lose_engine_until: Path | None = None  # a retryable error on every attempt, counted in this file, up to two
    worker: Path | None = None  # start a grandchild that writes its process id here
    note_start: Path | None = None  # a line is added here at every start
    seconds_to_save: float = 0.0  # after the request to stop
    inconclusive_until: Path | None = None  # the measurement is inconclusive until this file exists
    note_frames: Path | None = None  # the functions of ours above the body are written here
    leaks: str | None = None  # environment variable whose value appears in a log, a library's log and an error


def run(context: StageContext, config: CollectConfig) -> None:
    if config.note_start is not None:
        with config.note_start.open("a") as stream:
            stream.write("started\n")
    if config.note_frames is not None:
        config.note_frames.write_text(json.dumps(frames_of_ours()))
    if config.worker is not None:
        _start_worker(config.worker)
    if config.lose_engine_until is not None:
        _lose_engine(config.lose_engine_until)
    if config.leaks is not None:
        _leak(context, os.environ[config.leaks])
    saved = context.work / "saved.json"
    numbers: list[int] = json.loads(saved.read_text()) if saved.exists() else []
    context.log(f"going on from {len(numbers)}")
    if context.earlier is not None:
        write_text(context.out / "metrics.jsonl", (context.earlier / "metrics.jsonl").read_text())
    while len(numbers) < config.count:
        if context.interrupted:
            time.sleep(config.seconds_to_save)
            context.log("saved")
            (context.work / "saved-when-asked").touch()
        context.check_interrupted()
        if len(numbers) == config.fail_at and not (config.allow and config.allow.exists()):
            raise DraftsmithError(f"number {config.fail_at} is bad: remove it")
        time.sleep(config.seconds_each)
        numbers.append(context.seed + len(numbers))
        write_text(saved, json.dumps(numbers))  # a kill leaves the old one or the new one
        context.metrics(len(numbers), value=numbers[-1])
        context.progress(len(numbers), config.count, "numbers", last=numbers[-1])
    (context.out / "numbers.json").write_text(json.dumps(numbers))
    context.summary(numbers=len(numbers))
    if config.inconclusive_until is not None and not config.inconclusive_until.exists():
        context.summary(**{INCONCLUSIVE: 1.0})


def _lose_engine(count_file: Path) -> None:
    lost = int(count_file.read_text()) if count_file.exists() else 0
    if lost < 2:
        count_file.write_text(str(lost + 1))
        raise RetryableError("the engine went away: start it again")


def _leak(context: StageContext, secret: str) -> None:
    """Log the secret as libraries log addresses, and raise it in a retryable error once."""
    context.log(f"asking {secret}")
    logging.getLogger("a library").warning("GET %s", secret)
    leaked = context.work / "leaked"
    if not leaked.exists():
        leaked.touch()
        try:
            raise ValueError(f"no answer of {secret}")
        except ValueError as error:
            raise RetryableError(f"{secret} went away: start it again") from error


def _start_worker(pid_file: Path) -> None:
    """Start a grandchild that ignores SIGTERM and sleeps for ten minutes."""
    import subprocess
    import sys

    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    worker = subprocess.Popen([sys.executable, "-c", code])
    pid_file.write_text(str(worker.pid))


STAGE = Stage(name="collect", config=CollectConfig, inputs=(), body=__name__, compute=Compute.HEAVY)
