"""What runs in a stage process: its context, its events, its end, for one process and for the ranks of several.

One line an event: `{"event": "log" | "progress" | "metrics" | "summary" | "error" | "done", ...}`. Whatever the stage
or a library prints goes to stderr. The exit code is that of the error (`artifacts/errors.py`), 1 if it was not
expected.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted, find_disk_error, from_os_error
from draftsmith.artifacts.redaction import redact_logs, redacted
from draftsmith.stages.runtime.memory import relax_gc, restore_gc
from draftsmith.stages.runtime.stage import Config, InputListing, Shard, Stage

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
METRICS_FILE = "metrics.jsonl"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def keep_freed_memory() -> None:
    """From here on the process keeps what it frees, and uses it again.

    glibc gives back what is large and what is last in its heap, so that tensors of the next layer, or step, are made of
    pages that the kernel clears anew: up to a third of a forward's time on a CPU. Both bounds move with what was freed
    before, up to 32 MB; set, they stay, and hold for a chunk's logits too. Elsewhere than on glibc nothing happens.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


class EventStream:
    """The way to the runner: one JSON line an event, written whole."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def send(self, event: str, **fields: Any) -> None:
        told = {name: redacted(value) if isinstance(value, str) else value for name, value in fields.items()}
        line = (json.dumps({"event": event, **told}, ensure_ascii=False, default=float) + "\n").encode()
        with self._lock, contextlib.suppress(BrokenPipeError):  # a runner that is gone hears nothing, and is no error
            while line:
                line = line[os.write(self._descriptor, line) :]

    @property
    def path(self) -> str:
        """By which ranks open it too, as long as this process lives."""
        return f"/proc/{os.getpid()}/fd/{self._descriptor}"


class ProcessContext:
    """The `StageContext` of a real run (see `stages/runtime/stage.py`)."""

    def __init__(
        self,
        *,
        out: Path,
        work: Path,
        inputs: Mapping[str, Path],
        seed: int,
        events: EventStream,
        stop: threading.Event,
        shards: Sequence[Path] = (),
    ) -> None:
        self.out = out
        self.work = work
        self.inputs = inputs
        self.seed = seed
        self.shards = shards
        self._events = events
        self._stop = stop

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
        """Drop what was written at `step` or later: a resumed stage will write it again."""
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
            raise StageInterrupted("the stage was asked to stop: run the same command to continue from what it saved")


class SecondaryRankContext(ProcessContext):
    """Of a rank that is not the first: what there is once, the first says and writes."""

    def metrics(self, step: int, **values: float) -> None:
        pass

    def rewind_metrics(self, step: int) -> None:
        pass


def _step_of(line: str) -> float:
    """Step of a line of metrics; infinite for a line that a killed process left half written."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


def run_request(request: Mapping[str, Any], events: EventStream, stop: threading.Event) -> int:
    """Run the stage that `request` names; returns the exit code. Errors become one `error` event."""
    try:
        if request.get("threads"):
            use_threads(int(request["threads"]))
        stage, config, context = _asked(request, events, stop)
        parallel = stage.parallel(config) if stage.parallel is not None else None
        if request.get("shard") is not None:
            stage.shard(context, config, Shard(**request["shard"]))
        elif parallel is not None and parallel.world > 1:
            from draftsmith.stages.runtime.launch import run_ranks

            use_threads(max(1, int(request.get("threads") or os.cpu_count() or 1) // parallel.processes))
            run_ranks(parallel, run_rank, request, events.path, stop)
        else:
            stage.run(context, config)
    except BaseException as error:
        known = _known(error, request)
        return _crash(events, error) if known is None else _fail(events, known)
    events.send("done")
    return 0


def use_threads(count: int) -> None:
    """Of the numerical libraries, which read it when they are loaded: those of this process, or of its ranks."""
    for variable in _THREAD_VARIABLES:
        os.environ[variable] = str(count)


def _asked(
    request: Mapping[str, Any], events: EventStream, stop: threading.Event, kind: type[ProcessContext] = ProcessContext
) -> tuple[Stage, Config, ProcessContext]:
    """The stage of a request, its config and its context."""
    stage: Stage = importlib.import_module(request["module"]).STAGE
    config = stage.config.model_validate(request["config"])
    if request.get("listing") is not None:
        config = config.with_pinned_files(InputListing(**request["listing"]))
    out, work = Path(request["out"]), Path(request["work"])
    out.mkdir(parents=True, exist_ok=True)
    work.mkdir(parents=True, exist_ok=True)
    inputs = {name: Path(path) for name, path in request["inputs"].items()}
    shards = [Path(path) for path in request.get("shards", ())]
    seed = int(request["seed"])
    context = kind(out=out, work=work, inputs=inputs, seed=seed, events=events, stop=stop, shards=shards)
    return stage, config, context


def run_rank(request: Mapping[str, Any] | None, events_path: str) -> int:
    """Run the stage as one of many ranks. Return 0, or the exit code of a stage that was interrupted.

    request: as `run_ranks` gives it; None on another node than the flow's, which gets it from there.
    events_path: where the first one reports. Another error goes into the rank's report, and ends the process with its
    exit code, and with it all ranks.
    """
    from draftsmith.stages.runtime.launch import RankReport, note_start
    from draftsmith.stages.runtime.ranks import process_group, rendezvous

    redact_logs()
    relax_gc()
    keep_freed_memory()
    stop = install_stop_handlers()
    rank = int(os.environ["LOCAL_RANK"])  # of the flow's node, also among all
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        if request is not None:
            note_start(Path(request["notes"]), rank)
        store, rank, request = rendezvous(request)
        events = EventStream(os.open(events_path if rank == 0 else os.devnull, os.O_WRONLY))
        if not Path(request["notes"]).is_dir():
            raise DraftsmithError(
                f"{request['work']} is not on {socket.gethostname()}. Mount DRAFTSMITH_HOME there, under the same path "
                "as on the node that runs the flow."
            )
        stage, config, context = _asked(request, events, stop, ProcessContext if rank == 0 else SecondaryRankContext)
        with process_group(store, rank):
            stage.run(context, config)
    except StageInterrupted as error:
        return error.exit_code
    except BaseException as error:
        known = None if request is None else _known(error, request)
        message = str(known or traceback.format_exception_only(error)[-1].strip().replace("\n", " "))
        code = 1 if known is None else known.exit_code
        _print_traceback()
        if request is not None:
            RankReport(rank, redacted(message), code, time.time()).write(Path(request["notes"]))
        raise SystemExit(code) from error
    return 0


def _known(error: BaseException, request: Mapping[str, Any]) -> DraftsmithError | None:
    """What a person is told of it: our own error, or that the disk refused something; None for anything unforeseen."""
    if isinstance(error, DraftsmithError):
        return error
    refused = find_disk_error(error)
    return from_os_error(refused, f"stage {request['stage']}: writing") if refused else None


def _fail(events: EventStream, error: DraftsmithError) -> int:
    _print_traceback()  # the event carries the one line for the person
    events.send("error", kind=type(error).__name__, message=str(error), exit_code=error.exit_code)
    return error.exit_code


def _print_traceback() -> None:
    """To the log file. Where its disk is full, what is to be said of that is said without it."""
    with contextlib.suppress(OSError):
        os.write(sys.stderr.fileno(), redacted(traceback.format_exc()).encode("utf-8", "replace"))


def _crash(events: EventStream, error: BaseException) -> int:
    _print_traceback()
    message = traceback.format_exception_only(error)[-1].strip()
    events.send("error", kind=type(error).__name__, message=message.replace("\n", " "), exit_code=1)
    return 1


def install_stop_handlers() -> threading.Event:
    """Set by SIGTERM and SIGINT."""
    stop = threading.Event()

    def ask_to_stop(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, ask_to_stop)
    return stop


def event_stream() -> EventStream:
    """Prints of libraries must not end up between the events: stdout becomes stderr, the events keep the real one.

    The copy is not inherited by the stage's own children, so the stream ends with this process.
    """
    events = EventStream(os.dup(sys.stdout.fileno()))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return events
