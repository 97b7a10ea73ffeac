"""The stage process: its context, its event stream, and how it ends.

Every event is one JSON line: `{"event": "log" | "progress" | "metrics" | "summary" | "error" | "done", ...}`. Whatever
the stage or a library prints goes to stderr. The exit code is the error's (`artifacts/errors.py`); 1 for an unexpected
error.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted, find_disk_error, from_os_error
from draftsmith.artifacts.home import home
from draftsmith.artifacts.redaction import shown, shown_traceback
from draftsmith.stages.runtime.memory import restore_gc
from draftsmith.stages.runtime.stage import Config, Stage, StageRequest

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
METRICS_FILE = "metrics.jsonl"
KERNELS = "kernels"  # folder in the home
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>


def keep_freed_memory() -> None:
    """Make the process keep the memory that it frees, to use it again.

    glibc returns large blocks and the end of its heap to the kernel, so that the tensors of the next layer or step get
    pages that the kernel must clear: up to a third of the time of a forward on a CPU. By default both thresholds follow
    the size of freed blocks, up to 32 MB. Once set they stay, and cover a chunk of logits too. Without glibc this does
    nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class EventStream:
    """Writes events to the runner, one JSON line each."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, event: str, **fields: Any) -> None:
        """Write one whole line."""
        values = {name: shown(value) if isinstance(value, str) else value for name, value in fields.items()}
        line = (json.dumps({"event": event, **values}, default=float) + "\n").encode("ascii")
        with self._lock, contextlib.suppress(BrokenPipeError):  # the runner has ended, which is not the stage's error
            while line:
                line = line[os.write(self._descriptor, line) :]

    @property
    def path(self) -> str:
        """Return the path by which ranks also open the stream, while this process lives."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"


class ProcessContext:
    """The `StageContext` of a run (`runtime/stage.py`)."""

    def __init__(self, request: StageRequest, events: EventStream, stop: threading.Event) -> None:
        """Create the folders that the request names. stop: set when the stage is asked to stop."""
        self.out, self.work = request.out, request.work
        self.inputs: Mapping[str, Path] = request.inputs
        self.shards: Sequence[Path] = request.shards
        self.earlier = request.earlier
        self.seed = request.seed
        self._events = events
        self._stop = stop
        self.out.mkdir(parents=True, exist_ok=True)
        self.work.mkdir(parents=True, exist_ok=True)

    def log(self, message: str) -> None:
        self._events.send("log", message=message)

    def progress(self, done: int, total: int, unit: str, **metrics: float) -> None:
        restore_gc()
        self._events.send("progress", done=done, total=total, unit=unit, metrics=metrics)

    def metrics(self, step: int, **values: float) -> None:
        values = {name: float(value) for name, value in values.items()}
        with (self.out / METRICS_FILE).open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"step": step, **values}) + "\n")
        self._events.send("metrics", step=step, values=values)

    def rewind_metrics(self, step: int) -> None:
        path = self.out / METRICS_FILE
        if not path.exists():
            return
        kept = [line for line in path.read_text("utf-8").splitlines() if _step_of(line) < step]
        write_text(path, "".join(f"{line}\n" for line in kept))

    def summary(self, **values: float) -> None:
        self._events.send("summary", values={name: float(value) for name, value in values.items()})

    @property
    def interrupted(self) -> bool:
        return self._stop.is_set()

    def check_interrupted(self) -> None:
        if self.interrupted:
            raise StageInterrupted("the stage was asked to stop. Run the same command to continue from what it saved.")


class SecondaryRankContext(ProcessContext):
    """The context of every rank but rank 0; only rank 0 writes metrics."""

    def metrics(self, step: int, **values: float) -> None:
        pass

    def rewind_metrics(self, step: int) -> None:
        pass


def _step_of(line: str) -> float:
    """Return the step of a line of metrics; infinity for a line that a killed process wrote only in part."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def use_threads(count: int) -> None:
    """Set the number of threads of numerical libraries that this process and its ranks load after this."""
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(count)


EXPANDABLE_SEGMENTS = ("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def use_expandable_segments() -> None:
    """Make torch's GPU allocator grow its segments, which leaves less memory unused, unless the user configured it.

    This process and its ranks read it from their environment.
    """
    name, value = EXPANDABLE_SEGMENTS
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:  # the variable's older name
        os.environ.setdefault(name, value)


def keep_kernels() -> None:
    """Make torch and Triton keep what they compile in the home, for later stages; unless the user set their folders.

    By default it lies in /tmp, which a container loses. This process, its ranks and its servers read the variables.
    """
    for variable, compiler in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
        os.environ.setdefault(variable, str(home() / KERNELS / compiler))


def load_stage(request: StageRequest) -> tuple[Stage, Config]:
    stage: Stage = importlib.import_module(request.module).STAGE
    config = stage.config.model_validate(request.config)
    return stage, config if request.listing is None else config.with_pinned_files(request.listing)


def expected_error(error: BaseException, request: StageRequest) -> DraftsmithError | None:
    """Return the error to report if it is one of ours or a disk error; None if it was unexpected."""
    if isinstance(error, DraftsmithError):
        return error
    refused = find_disk_error(error)
    return from_os_error(refused, f"stage {request.stage}: writing") if refused else None


def error_line(error: BaseException) -> str:
    """Return the kind and message of an error in one line."""
    return traceback.format_exception_only(error)[-1].strip().replace("\n", " ")


def print_traceback(error: BaseException) -> None:
    """Write the traceback to the log, best effort: if the disk is full, the error is reported without it."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), shown_traceback(error).encode())


def install_stop_handlers() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set from now on."""
    stop = threading.Event()

    def ask_to_stop(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, ask_to_stop)
    return stop


def event_stream() -> EventStream:
    """Return a stream of events on stdout, and redirect what libraries print to stderr.

    The stage's child processes do not inherit the stream, so it ends with this process.
    """
    events = EventStream(os.dup(sys.stdout.fileno()))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return events
