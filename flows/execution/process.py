"""Runs one stage as a process: its events, its time limit, and the end of its whole process group."""

from __future__ import annotations

import contextlib
import json
import math
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import (
    DraftsmithError,
    RetryableError,
    StageInterrupted,
    TimeLimitError,
)
from draftsmith.stages.runtime.child_process import ChildProcess, describe_exit, project_environment
from draftsmith.stages.runtime.stage import StageRequest

_POLL_S = 0.2
_DRAIN_S = 1.0  # to read what a stage wrote just before it ended; a worker that survives it may keep the pipe open

Event = dict[str, Any]


class StageFailedError(DraftsmithError):
    """Raised when a stage's process failed. The message is the stage's own line and the path of its log."""

    exit_code = 1


def run_stage(
    request: StageRequest,
    log: Path,
    *,
    node: str,
    limit_s: float,
    grace_s: float,
    follow: Callable[[Event], None] = lambda _event: None,
    check: Callable[[], None] = lambda: None,
    descriptors: tuple[int, ...] = (),
    environment: Mapping[str, str] = {},
) -> dict[str, float]:
    """Run the stage to its end, hand every event to `follow` as it comes, and return the stage's metrics.

    node: name of the node with this time limit. grace_s: seconds to save, from the request to stop until it is killed.
    check: called before the start and during the run; what it raises ends the stage. descriptors: stay open in the
    process, such as the lock of what it writes. environment: variables added to ours.

    Whatever ends the wait (the time limit, Ctrl-C, SIGTERM turned into an exception, an error in `follow` or `check`),
    the stage is asked to stop, has `grace_s` seconds to save, and then its whole process group is killed. It has this
    time even if we are killed meanwhile. Raises `DraftsmithError` with the stage's own line and the path of its log.
    """
    check()
    last: dict[str, Event] = {}  # by kind
    summary: dict[str, float] = {}
    lines: queue.Queue[bytes] = queue.Queue()

    def handle_lines(wait_s: float) -> None:
        """Handle the events that have arrived, after waiting for the first one."""
        try:
            arrived = [lines.get(timeout=wait_s)]
        except queue.Empty:
            return
        arrived += [lines.get_nowait() for _ in range(lines.qsize())]
        for event in filter(None, map(_parse, arrived)):
            last[event["event"]] = event
            if event["event"] == "summary":  # a manifest is JSON, which has no NaN
                summary.update({name: value for name, value in event["values"].items() if math.isfinite(value)})
            follow(event)

    child, reader = _start(request, log, descriptors, environment, lines)
    deadline = time.monotonic() + limit_s
    try:
        while child.process.poll() is None:
            check()
            if time.monotonic() > deadline:
                raise TimeLimitError(
                    f"stage {request.stage} ran past its limit of {limit_s / 60:g} minutes and was stopped. Raise "
                    f"stages.time_limits.{node} and run the same command again, which resumes from what was saved "
                    f"(log: {log})."
                )
            handle_lines(min(_POLL_S, max(0.01, deadline - time.monotonic())))
        reader.join(_DRAIN_S)
        handle_lines(0.01)
    except BaseException:
        if child.process.poll() is None:
            child.request_stop(grace_s)  # only the stage: it ends its own workers when it has saved
            killed_at = time.monotonic() + grace_s
            while child.process.poll() is None and time.monotonic() < killed_at:  # a second Ctrl-C does not wait
                with contextlib.suppress(Exception):  # `follow` may have raised the error that ends the stage
                    handle_lines(_POLL_S)
        raise
    finally:
        child.end()
    if child.process.returncode == 0 and "done" in last:
        return summary
    raise _error(request.stage, child.process.returncode, last.get("error"), log)


def _start(
    request: StageRequest,
    log: Path,
    descriptors: tuple[int, ...],
    environment: Mapping[str, str],
    lines: queue.Queue[bytes],
) -> tuple[ChildProcess, threading.Thread]:
    """Start the stage's process, and the thread that puts its lines into the queue."""
    log.parent.mkdir(parents=True, exist_ok=True)
    request_path = log.with_suffix(".request.json")
    request_path.write_text(request.model_dump_json(indent=2), "utf-8")
    read_end, write_end = os.pipe()
    stream = os.fdopen(read_end, "rb")
    try:
        with log.open("ab") as written:
            child = ChildProcess(
                # -P: a folder `draftsmith` in the current folder must not hide the package
                [sys.executable, "-P", "-m", "draftsmith.stages", str(request_path)],
                environment={
                    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # numbers as in nvidia-smi, the locks and the checks
                    # Threads of GNU's OpenMP spin before they sleep. By default they spin so long that two threads on
                    # a busy machine decode at a quarter of the speed that this gives.
                    "GOMP_SPINCOUNT": "10000",
                    **project_environment(),
                    **environment,
                    "PYTHONUNBUFFERED": "1",
                },
                stdout=write_end,
                stderr=written,
                pass_fds=descriptors,
            )
    except BaseException:
        stream.close()
        raise
    finally:
        os.close(write_end)

    def read() -> None:
        with stream:
            for line in stream:
                lines.put(line)

    reader = threading.Thread(target=read, name=f"events of {request.stage}", daemon=True)
    reader.start()
    return child, reader


def _parse(line: bytes) -> Event | None:
    """Return the event of a line; None for a line that a killed process wrote in part."""
    try:
        event = json.loads(line)
        return event if isinstance(event["event"], str) else None
    except (ValueError, KeyError, TypeError):
        return None


def _error(stage: str, code: int, reported: Event | None, log: Path) -> DraftsmithError:
    """Return the error of a process that ended with this code. reported: the error event of the stage."""
    where = f"(log: {log})"
    if reported is None:
        return StageFailedError(f"stage {stage} {_describe_end(code)} {where}.")
    kinds = {kind.exit_code: kind for kind in (RetryableError, StageInterrupted, DraftsmithError)}
    return kinds.get(code, StageFailedError)(f"stage {stage}: {reported.get('message', 'failed')} {where}")


def _describe_end(code: int) -> str:
    if code == -signal.SIGKILL:
        return f"{describe_exit(code)}, most often because the machine ran out of memory. Use smaller batches"
    return f"{describe_exit(code)} without an error message. See the end of its log"
