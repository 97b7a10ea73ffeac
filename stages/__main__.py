"""The stage process: `python -m draftsmith.stages REQUEST.json` runs one stage and reports as JSON lines on stdout.

One line an event: `{"event": "log" | "progress" | "metrics" | "summary" | "error" | "done", ...}`. Whatever the stage
or a library prints goes to stderr. The exit code is that of the error (`artifacts/errors.py`), 1 if it was not
expected.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted, disk_error_of, from_os_error
from draftsmith.artifacts.redaction import redact_logs, redacted
from draftsmith.stages.lifeline import die_with_parent

_THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS")
METRICS_FILE = "metrics.jsonl"


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


class ProcessContext:
    """The `StageContext` of a real run (see `stages/contract.py`)."""

    def __init__(
        self,
        *,
        out: Path,
        work: Path,
        inputs: Mapping[str, Path],
        seed: int,
        events: EventStream,
        stop: threading.Event,
    ) -> None:
        self.out = out
        self.work = work
        self.inputs = inputs
        self.seed = seed
        self._events = events
        self._stop = stop

    def log(self, message: str) -> None:
        self._events.send("log", message=message)

    def progress(self, done: int, total: int, unit: str, **figures: float) -> None:
        self._events.send("progress", done=done, total=total, unit=unit, figures=figures)

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
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), "utf-8")
        temporary.replace(path)

    def summary(self, **values: float) -> None:
        self._events.send("summary", values={name: float(value) for name, value in values.items()})

    @property
    def interrupted(self) -> bool:
        return self._stop.is_set()

    def check_interrupted(self) -> None:
        if self.interrupted:
            raise StageInterrupted("the stage was asked to stop: run the same command to continue from what it saved")


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
            for variable in _THREAD_VARIABLES:  # read when the numerical libraries are loaded, so set before
                os.environ[variable] = str(request["threads"])
        stage = importlib.import_module(request["module"]).STAGE
        config = stage.config.model_validate(request["config"])
        out, work = Path(request["out"]), Path(request["work"])
        out.mkdir(parents=True, exist_ok=True)
        work.mkdir(parents=True, exist_ok=True)
        inputs = {name: Path(path) for name, path in request["inputs"].items()}
        context = ProcessContext(out=out, work=work, inputs=inputs, seed=int(request["seed"]), events=events, stop=stop)
        stage.run(context, config)
    except DraftsmithError as error:
        return _fail(events, error)
    except BaseException as error:
        if refused := disk_error_of(error):
            return _fail(events, from_os_error(refused, f"stage {request['stage']}: writing"))
        return _crash(events, error)
    events.send("done")
    return 0


def _fail(events: EventStream, error: DraftsmithError) -> int:
    _print_traceback()  # to the log file: the event carries the one line for the person
    events.send("error", kind=type(error).__name__, message=str(error), exit_code=error.exit_code)
    return error.exit_code


def _print_traceback() -> None:
    print(redacted(traceback.format_exc()), end="", file=sys.stderr)


def _crash(events: EventStream, error: BaseException) -> int:
    _print_traceback()
    message = traceback.format_exception_only(error)[-1].strip()
    events.send("error", kind=type(error).__name__, message=message.replace("\n", " "), exit_code=1)
    return 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m draftsmith.stages", description="Run one stage in this process.")
    parser.add_argument("request", type=Path, help="JSON file: stage, module, config, inputs, out, work, seed, threads")
    parser.add_argument("--lifeline", type=int, help="read end of a pipe; when it closes the process group is killed")
    options = parser.parse_args(arguments)
    if options.lifeline is not None:
        die_with_parent(options.lifeline)

    redact_logs()
    stop = threading.Event()

    def ask_to_stop(_signal: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGTERM, ask_to_stop)
    signal.signal(signal.SIGINT, ask_to_stop)

    # Prints of libraries must not end up between the events: stdout becomes stderr, the events keep the real one.
    # The copy is not inherited by the stage's own children, so the stream ends with this process.
    events = EventStream(os.dup(sys.stdout.fileno()))
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    return run_request(json.loads(options.request.read_text("utf-8")), events, stop)


if __name__ == "__main__":
    sys.exit(main())
