"""Runs one stage as a process: its events, its time limit, and the end of its whole process group."""

from __future__ import annotations

import contextlib
import json
import math
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import (
    EXIT_INTERRUPTED,
    EXIT_RETRYABLE,
    DraftsmithError,
    RetryableError,
    StageInterrupted,
    TimeLimitError,
)
from draftsmith.flows.config.options import TimeLimit
from draftsmith.stages.runtime.child_process import ChildProcess, describe_exit, project_environment
from draftsmith.stages.runtime.stage import StageRequest

_POLL_S = 0.2
_DRAIN_S = 1.0  # to read what a stage wrote just before it ended

Event = dict[str, Any]


class StageFailedError(DraftsmithError):
    """Raised when a stage's process failed. The message is the stage's own line and the path of its log."""

    exit_code = 1


@dataclass(frozen=True)
class ProcessOptions:
    """Options of a stage's process."""

    log_path: Path
    limit: TimeLimit
    grace_s: float  # time to save, from the request to stop until it is killed
    pass_fds: tuple[int, ...] = ()  # kept open in the process, such as the lock of what it writes
    environment: Mapping[str, str] = field(default_factory=dict)  # added to ours


@dataclass
class StageOutcome:
    """The report of a stage that ended well."""

    duration_s: float
    summary: dict[str, float] = field(default_factory=dict)


def run_stage(
    request: StageRequest,
    options: ProcessOptions,
    on_event: Callable[[Event], None],
    check: Callable[[], None] = lambda: None,
) -> StageOutcome:
    """Run the stage to its end and hand every event to `on_event` as it comes.

    check: called before the start and during the run; what it raises ends the stage.

    Whatever ends the wait (the time limit, Ctrl-C, SIGTERM turned into an exception, an error in `on_event` or
    `check`), the stage is asked to stop, has `grace_s` seconds to save, and then its whole process group is killed. It
    has this time even if we are killed meanwhile. Raises `DraftsmithError` with the stage's own line and the path of
    its log.
    """
    check()
    log_path = options.log_path
    log_path.parent.mkdir(parents=True, exist_ok=True)
    request_path = log_path.with_suffix(".request.json")
    request_path.write_text(request.model_dump_json(indent=2), "utf-8")
    with log_path.open("ab") as log:
        child = ChildProcess(
            # -P: a folder `draftsmith` in the current folder must not hide the package
            [sys.executable, "-P", "-m", "draftsmith.stages", str(request_path)],
            environment={
                "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # numbers as in nvidia-smi, the locks and the checks
                # Threads of GNU's OpenMP spin before they sleep, by default so long that two threads on a busy machine
                # decode at a quarter of the speed with this.
                "GOMP_SPINCOUNT": "10000",
                **project_environment(),
                **options.environment,
                "PYTHONUNBUFFERED": "1",
            },
            stdout=subprocess.PIPE,
            stderr=log,
            pass_fds=options.pass_fds,
        )
    try:
        stage = _RunningStage(request.stage, child, log_path, on_event)
        try:
            stage.wait(options.limit, check)
        except BaseException:
            stage.stop(options.grace_s)
            raise
        return stage.outcome()
    finally:
        child.end()


class _RunningStage:
    """Reads the events of a stage's process until its end."""

    def __init__(self, name: str, child: ChildProcess, log_path: Path, on_event: Callable[[Event], None]) -> None:
        assert child.process.stdout is not None
        self._name = name
        self._child, self._process = child, child.process
        self._log_path = log_path
        self._on_event = on_event
        self._started = time.monotonic()
        self._buffer = b""
        self._stream = child.process.stdout
        os.set_blocking(self._stream.fileno(), False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._stream, selectors.EVENT_READ)
        self._summary: dict[str, float] = {}
        self._error: Event | None = None
        self._done = False

    def wait(self, limit: TimeLimit, check: Callable[[], None]) -> None:
        """Wait until the process has ended. Raises `TimeLimitError` at the time limit, and what `check` raises."""
        deadline = self._started + limit.seconds
        while self._process.poll() is None:
            check()
            if time.monotonic() > deadline:
                raise TimeLimitError(
                    f"stage {self._name} ran past its limit of {limit.seconds / 60:g} minutes and was stopped. Raise "
                    f"{limit.field} and run the same command again, which resumes from what was saved "
                    f"(log: {self._log_path})."
                )
            self._read(min(_POLL_S, max(0.0, deadline - time.monotonic())))
        self._drain()

    def stop(self, grace_s: float) -> None:
        """Ask the stage to save and end, and wait for that at most `grace_s`. A second Ctrl-C does not wait."""
        if self._process.poll() is not None:
            return
        self._child.request_stop(grace_s)  # only the stage: it ends its own workers when it has saved
        deadline = time.monotonic() + grace_s
        while self._process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(Exception):  # on_event may have raised the error that ends the stage
                self._read(_POLL_S)

    def outcome(self) -> StageOutcome:
        """Return the report of a process that ended well. Raises the error of one that failed."""
        code = self._process.returncode
        if code == 0 and self._done:
            return StageOutcome(round(time.monotonic() - self._started, 3), self._summary)
        where = f"(log: {self._log_path})"
        if self._error is None:
            raise StageFailedError(f"stage {self._name} {_describe_end(code)} {where}.")
        message = f"stage {self._name}: {self._error.get('message', 'failed')} {where}"
        if code == EXIT_RETRYABLE:
            raise RetryableError(message)
        if code == EXIT_INTERRUPTED:
            raise StageInterrupted(message)
        if code == DraftsmithError.exit_code:
            raise DraftsmithError(message)
        raise StageFailedError(message)

    def _drain(self) -> None:
        """Read the rest of the pipe, for a limited time: a worker that survived its stage may keep it open."""
        deadline = time.monotonic() + _DRAIN_S
        while self._read(0.0) and time.monotonic() < deadline:
            pass

    def _read(self, timeout: float) -> bool:
        """Handle the events that have arrived, after waiting at most `timeout` seconds. False if there were none."""
        if not self._selector.get_map():
            time.sleep(timeout)  # the stream has ended, the process not yet
            return False
        if not self._selector.select(timeout):
            return False
        chunk = self._stream.read(1 << 16)
        if not chunk:
            self._selector.unregister(self._stream)
            return False
        *lines, self._buffer = (self._buffer + chunk).split(b"\n")
        for line in lines:
            self._handle(line)
        return True

    def _handle(self, line: bytes) -> None:
        try:
            event = json.loads(line)
            kind = event["event"]
        except (ValueError, KeyError, TypeError):
            return  # a process that was killed in the middle of a line
        if kind == "summary":
            # A manifest is JSON, which has no NaN: such a metric is left out.
            self._summary.update({name: value for name, value in event["values"].items() if math.isfinite(value)})
        elif kind == "error":
            self._error = event
        elif kind == "done":
            self._done = True
        self._on_event(event)


def _describe_end(code: int) -> str:
    if code == -signal.SIGKILL:
        return f"{describe_exit(code)}, most often because the machine ran out of memory. Use smaller batches"
    return f"{describe_exit(code)} without an error message. See the end of its log"
