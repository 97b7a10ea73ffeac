"""Runs a stage as several ranks: the start on the node of the flow, and the process of each rank."""

from __future__ import annotations

import os
import shutil
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError, StageInterrupted
from draftsmith.artifacts.host import visible_gpus
from draftsmith.artifacts.redaction import redact_logs, redacted
from draftsmith.stages.runtime.launch import RankReport, launch, note_start
from draftsmith.stages.runtime.memory import relax_gc
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

_NOTES = "ranks"  # folder in `work`, with a folder for each launch: a rank of an earlier launch writes into its own


def run_ranks(parallel: ParallelConfig, request: StageRequest, events_path: str, stop: threading.Event) -> None:
    """Run the requested stage in all ranks of this node; return when all have returned.

    events_path: the event stream, to which rank 0 writes. stop: set when the stage is asked to stop. Raises as `launch`
    does, and DraftsmithError if the node has too few GPUs.
    """
    gpus = len(visible_gpus())
    if 0 < gpus < parallel.processes:
        raise DraftsmithError(
            f"parallel.processes: {parallel.processes} processes need a GPU each, but {gpus} are visible. Lower it, or "
            "make more visible (CUDA_VISIBLE_DEVICES)."
        )
    notes_of_launches = request.work / _NOTES
    shutil.rmtree(notes_of_launches, ignore_errors=True)
    notes = notes_of_launches / uuid.uuid4().hex
    launch(parallel, run_rank, (request, notes, events_path), notes=notes, stop=stop)


def run_rank(request: StageRequest | None, notes: Path | None, events_path: str) -> int:
    """Run the stage as one rank. Return 0, or the exit code of a stage that was interrupted.

    request, notes: of the launch; None on a node other than the flow's, which receives them from there. events_path:
    where rank 0 reports. Any other error goes into the rank's report and ends the process with the error's exit code,
    and with it all ranks.
    """
    redact_logs()
    relax_gc()
    keep_freed_memory()
    stop = install_stop_handlers()
    rank = int(os.environ["LOCAL_RANK"])  # on the flow's node it is the global rank too
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
    except StageInterrupted as error:
        return error.exit_code
    except BaseException as error:
        print_traceback()
        known = None if request is None else expected_error(error, request)
        code = 1 if known is None else known.exit_code
        if notes is not None:
            message = redacted(error_line(error) if known is None else str(known))
            RankReport(rank, message, code, time.time()).write(notes)
        raise SystemExit(code) from error
    return 0
