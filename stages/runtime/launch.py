"""Runs a stage as several ranks, with torch's elastic launcher (the library under `torchrun`).

Ranks belong to the process group of the stage, so that they end with it. A stage that is asked to stop asks its ranks;
the loss of one ends all. They are forked from a server that has imported their modules once, however many ranks there
are. On other nodes `torchrun` starts the ranks (`stages/runtime/join.py`).
"""

from __future__ import annotations

import errno
import json
import logging
import multiprocessing
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from draftsmith.artifacts.errors import (
    EXIT_INTERRUPTED,
    DraftsmithError,
    RetryableError,
    StageInterrupted,
    from_os_error,
)
from draftsmith.artifacts.host import visible_gpus
from draftsmith.artifacts.redaction import redact_logs, shown
from draftsmith.stages.runtime.memory import peak_memory_gb, relax_gc
from draftsmith.stages.runtime.process import (
    EventStream,
    ProcessContext,
    SecondaryRankContext,
    error_line,
    expected_error,
    install_stop_handlers,
    keep_freed_memory,
    load_stage,
    print_traceback,
)
from draftsmith.stages.runtime.ranks import process_group, rendezvous
from draftsmith.stages.runtime.stage import ParallelConfig, StageRequest

_TORCHRUN_ID = "none"  # torchrun's default `--rdzv-id`
_POLL_S = 0.1
_ECHO_S = 3.0
_PRELOADED = ["transformers.modeling_utils", "draftsmith.stages.runtime.launch"]
# gloo between processes, NCCL's watchdog, and the store under both report that another rank was not there in time
_TIMED_OUT = re.compile(r"gloo.*timed out|collective operation timeout|DistStoreError.*(timed out|timeout)", re.I)
# the same, on a node that lost another one
_CUT_OFF = re.compile(r"connection (was )?(closed|reset)|broken pipe|remote process exited|remote error", re.I)
_KINDS = {kind.exit_code: kind for kind in (DraftsmithError, RetryableError, StageInterrupted)}
_WHY_LOST = {
    -signal.SIGKILL: " Most often the machine ran out of memory: lower micro_batch_tokens.",
    -signal.SIGABRT: " NCCL aborts a rank that waited too long for another one, which may hang.",
}
_STOPPED = "the stage was asked to stop. Run the same command to continue from what it saved."
_CONTINUES = "The same command continues from the checkpoint."


class RankFailedError(DraftsmithError):
    """A rank failed unexpectedly; its log says more."""

    exit_code = 1


@dataclass(frozen=True)
class RankReport:
    """The error that ended a rank, as the rank reports it."""

    rank: int
    message: str
    exit_code: int
    at: float = field(default_factory=time.time)  # seconds since the epoch

    def write(self, notes: Path) -> None:
        """Write the report for the process that started the ranks. notes: folder of the launch."""
        with suppress(OSError):  # the next attempt has begun, or the full disk has space only for the file's name
            (notes / f"{self.rank}.json").write_text(json.dumps(asdict(self)), "utf-8")
        if self.exit_code not in _KINDS:
            time.sleep(_ECHO_S)  # if the loss of another rank caused the error, the launcher must see that loss first

    @classmethod
    def read(cls, path: Path) -> RankReport:
        """Read a report; an incomplete one means that the disk is full."""
        try:
            return cls(**json.loads(path.read_text("utf-8")))
        except ValueError:
            refused = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            error = from_os_error(refused, f"rank {path.stem}: writing its error report")
            return cls(int(path.stem), str(error), error.exit_code, path.stat().st_mtime)


def note_start(notes: Path, rank: int) -> None:
    """Note this process's rank, and so that it handles signals: a killed process cannot report its rank."""
    (notes / f"{socket.gethostname()}.{os.getpid()}").write_text(str(rank), "utf-8")


def _started_ranks(notes: Path) -> dict[int, str]:
    """Return process id -> rank, for this machine."""
    paths = notes.glob(f"{socket.gethostname()}.*")
    return {int(path.name.rpartition(".")[2]): path.read_text("utf-8") for path in paths}


def launch(
    parallel: ParallelConfig,
    entry: Callable[..., int],
    arguments: tuple[Any, ...],
    *,
    notes: Path,
    stop: threading.Event,
) -> None:
    """Run `entry(*arguments)` in this node's ranks; return when all ranks have returned.

    entry: a function of a module that the ranks can import. It calls `note_start`, and returns an exit code if it ended
    in a way that its stage foresees. notes: a folder for only this launch. stop: set when the stage is asked to stop;
    the ranks are then asked too. Raises StageInterrupted if they were interrupted, else the error of the rank that
    ended the others, which names the rank.
    """
    one_node = parallel.nodes == 1
    host, port = ("localhost", 0) if one_node else parallel.endpoint()
    notes.mkdir(parents=True, exist_ok=True)
    config = LaunchConfig(
        min_nodes=parallel.nodes,
        max_nodes=parallel.nodes,
        nproc_per_node=parallel.processes,
        run_id=notes.name if one_node else _TORCHRUN_ID,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{host}:{port}",
        rdzv_configs={"is_host": True},
        local_addr=host,
        max_restarts=0,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(notes / "elastic")),
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)  # `_cause` reports what ended the ranks
    multiprocessing.set_forkserver_preload(_PRELOADED)
    result: dict[str, Any] = {}

    def agent() -> None:  # in a thread: in the main thread it would handle signals itself, by killing after 30 s
        try:
            result["codes"] = elastic_launch(config, entry)(*arguments)
        except BaseException as error:
            result["error"] = error

    thread = threading.Thread(target=agent, name="ranks", daemon=True)
    thread.start()
    asked: set[int] = set()  # process ids
    while thread.is_alive():
        thread.join(_POLL_S)
        if stop.is_set():
            for pid in _started_ranks(notes).keys() - asked:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                asked.add(pid)
            if not one_node and not asked and not multiprocessing.active_children():
                raise StageInterrupted(
                    "the stage was asked to stop while it waited for its other nodes. Run the same command again."
                )
    if "codes" not in result:
        raise _cause(notes, result["error"], parallel, stopped=stop.is_set())
    if EXIT_INTERRUPTED in result["codes"].values():
        raise StageInterrupted(_STOPPED)


def _cause(notes: Path, error: BaseException, parallel: ParallelConfig, *, stopped: bool) -> DraftsmithError:
    """Return the one error that ended all ranks. Errors of ranks that lost another rank are not the cause."""
    world = parallel.world
    reports = sorted((RankReport.read(path) for path in notes.glob("*.json")), key=lambda report: report.at)
    for report in reports:
        if report.exit_code in _KINDS:
            return _KINDS[report.exit_code](report.message)
    if stopped:
        return StageInterrupted(_STOPPED)
    # ranks without a report: a rank that waits for others always reports when they end
    silent = sorted(set(range(world)) - {report.rank for report in reports})
    who = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))} of {world}"
    if reports and _TIMED_OUT.search(reports[0].message) and silent:
        return RetryableError(
            f"{who} did not answer: rank {reports[0].rank} timed out ({reports[0].message}), and all were ended. "
            f"{_CONTINUES}"
        )
    if isinstance(error, ChildFailedError):
        failure = next(iter(error.failures.values()))
        rank = _started_ranks(notes).get(failure.pid, f"{failure.local_rank}, which had not started,")
        if failure.exitcode < 0 or rank not in [str(report.rank) for report in reports]:
            return RetryableError(
                f"rank {rank} of {world} was lost, with exit code {failure.exitcode}, and the others were ended. "
                f"{_CONTINUES}{_WHY_LOST.get(failure.exitcode, '')}"
            )
    if reports and _CUT_OFF.search(reports[0].message) and silent:
        return RetryableError(
            f"{who}, on another node, ended without a report ({reports[0].message}). The log of `torchrun` there has "
            "the reason; the same command continues from the checkpoint."
        )
    if reports:
        return RankFailedError(f"rank {reports[0].rank} of {world}: {reports[0].message}")
    if isinstance(error, RendezvousError) and parallel.nodes > 1:
        return RetryableError(
            f"parallel.nodes: {parallel.nodes} nodes did not meet at {':'.join(map(str, parallel.endpoint()))} "
            f"({type(error).__name__}: {error}). Start `torchrun` on each other node (configs/scale/README.md), and "
            "check that this node has that name and the port is free."
        )
    return RankFailedError(f"the ranks could not be run: {type(error).__name__}: {error}")


_NOTES = "ranks"  # folder in `work`, with a folder for each launch: a rank of an earlier launch writes into its own


def run_ranks(parallel: ParallelConfig, request: StageRequest, events_path: str, stop: threading.Event) -> None:
    """Run the requested stage in all ranks of this node; return when all have returned.

    events_path: the event stream, to which rank 0 writes. stop: set when the stage is asked to stop. Raises the same
    errors as `launch`, and DraftsmithError if the node has too few GPUs.
    """
    gpus = len(visible_gpus())
    if 0 < gpus < parallel.processes:
        raise DraftsmithError(
            f"parallel.processes: {parallel.processes} processes need a GPU each, but {gpus} are visible. Lower it, or "
            "make more visible (CUDA_VISIBLE_DEVICES)."
        )
    all_notes = request.work / _NOTES
    shutil.rmtree(all_notes, ignore_errors=True)
    notes = all_notes / uuid.uuid4().hex
    launch(parallel, run_rank, (request, notes, events_path), notes=notes, stop=stop)


def run_rank(request: StageRequest | None, notes: Path | None, events_path: str) -> int:
    """Run the stage as one rank. Return 0, or the exit code of a stage that was interrupted.

    request, notes: those of the launch; None on a node other than the flow's, which receives them from there.
    events_path: where rank 0 reports. Any other error goes into the rank's report and ends the process with the error's
    exit code, and then all ranks.
    """
    redact_logs()
    relax_gc()
    keep_freed_memory()
    stop = install_stop_handlers()
    rank = int(os.environ["LOCAL_RANK"])  # on the flow's node this is the global rank too
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        if notes is not None:
            note_start(notes, rank)
        store, rank, request, notes = rendezvous(request, notes)
        events = EventStream(os.open(events_path if rank == 0 else os.devnull, os.O_WRONLY))
        if not notes.is_dir():
            raise DraftsmithError(
                f"{request.work} is not on {socket.gethostname()}. Mount DRAFTSMITH_HOME there, under the same path as "
                "on the node that runs the flow."
            )
        stage, config = load_stage(request)
        context = (ProcessContext if rank == 0 else SecondaryRankContext)(request, events, stop)
        with process_group(store, rank):
            stage.run(context, config)
        context.summary(peak_memory_gb=peak_memory_gb())
    except StageInterrupted as error:
        return error.exit_code
    except BaseException as error:
        print_traceback(error)
        known = None if request is None else expected_error(error, request)
        code = 1 if known is None else known.exit_code
        if notes is not None:
            message = shown(error_line(error) if known is None else str(known))
            RankReport(rank, message, code, time.time()).write(notes)
        raise SystemExit(code) from error
    return 0
