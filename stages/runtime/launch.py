"""Starting the ranks of a stage with torch's elastic launcher (what `torchrun` is made of), and how they ended.

Ranks belong to the process group of the stage, so that its lifeline ends them with it. A stage that is asked to stop
asks them; one that is lost ends all. They are forked from a server that has imported what they need: so that is read
once, however many they are. Ranks of other nodes are started there by `torchrun` (`stages/runtime/join.py`).
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
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import (
    EXIT_INTERRUPTED,
    DraftsmithError,
    RetryableError,
    StageInterrupted,
    from_os_error,
)
from draftsmith.artifacts.host import visible_gpus
from draftsmith.stages.runtime.stage import ParallelConfig

_NOTES = "ranks"  # folder in `work`, with one for each launch: what of an earlier one still ends writes into its own
_TORCHRUN_ID = "none"  # `--rdzv-id` of a torchrun that names none
_POLL_S = 0.1
_ECHO_S = 3.0
_NEEDED = ["torch.distributed", "transformers.modeling_utils", "draftsmith.stages.runtime.ranks"]
# gloo between processes, the watchdog of NCCL, and the store behind both: another rank did not come in time
_WAITED = re.compile(r"gloo.*timed out|collective operation timeout|DistStoreError.*(timed out|timeout)", re.IGNORECASE)
# the same of a rank whose node lost another one
_CUT_OFF = re.compile(r"connection (was )?(closed|reset)|broken pipe|remote process exited|remote error", re.IGNORECASE)
_KINDS = {kind.exit_code: kind for kind in (DraftsmithError, RetryableError, StageInterrupted)}
_WHY_LOST = {
    -signal.SIGKILL: "; memory that ran out is what most often kills: lower micro_batch_tokens",
    -signal.SIGABRT: "; NCCL ends a rank so that waited too long for another one, which may hang",
}


class RankFailedError(DraftsmithError):
    """Something unforeseen in a rank; its log says more."""

    exit_code = 1


@dataclass(frozen=True)
class RankReport:
    """What a rank says of the error that ends it."""

    rank: int
    message: str
    exit_code: int
    at: float = field(default_factory=time.time)  # seconds since the epoch

    def write(self, notes: Path) -> None:
        """Leave it for the process that started the ranks. notes: folder of the launch."""
        with suppress(OSError):  # the next attempt has begun, or the disk has no room for more than the file's name
            (notes / f"{self.rank}.json").write_text(json.dumps(asdict(self)), "utf-8")
        if self.exit_code not in _KINDS:
            time.sleep(_ECHO_S)  # it may be the echo of another one's end, which the launcher is to see first

    @classmethod
    def read(cls, path: Path) -> RankReport:
        """What was written; of one that is not whole, that the disk is full."""
        try:
            return cls(**json.loads(path.read_text("utf-8")))
        except ValueError:
            refused = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            error = from_os_error(refused, f"rank {path.stem}: writing what ended it,")
            return cls(int(path.stem), str(error), error.exit_code, path.stat().st_mtime)


def note_start(notes: Path, rank: int) -> None:
    """Note which rank this process is, and that it hears signals: what is killed cannot say it."""
    (notes / f"{socket.gethostname()}.{os.getpid()}").write_text(str(rank), "utf-8")


def _started(notes: Path) -> dict[int, str]:
    """Process id -> rank, of this machine."""
    found = notes.glob(f"{socket.gethostname()}.*")
    return {int(path.name.rpartition(".")[2]): path.read_text("utf-8") for path in found}


def run_ranks(
    parallel: ParallelConfig,
    entry: Callable[..., int],
    request: Mapping[str, Any],
    events: str,
    stop: threading.Event,
) -> None:
    """Run `entry(request, events)` on all ranks; the request that they get names the folder of their notes.

    events: path that the first rank, which is on this node, writes to. Raises as `launch` does, and DraftsmithError
    where a device is missing.
    """
    _check_devices(parallel.processes)
    earlier = Path(request["work"]) / _NOTES
    shutil.rmtree(earlier, ignore_errors=True)
    notes = earlier / uuid.uuid4().hex
    launch(parallel, entry, ({**request, "notes": str(notes)}, events), notes=notes, stop=stop)


def _check_devices(processes: int) -> None:
    """Raise DraftsmithError where this node has GPUs, and fewer than processes."""
    devices = len(visible_gpus())
    if 0 < devices < processes:
        raise DraftsmithError(
            f"parallel.processes: {processes} need a GPU each, and {devices} are here: lower it, or make more "
            "visible (CUDA_VISIBLE_DEVICES)"
        )


def launch(
    parallel: ParallelConfig,
    entry: Callable[..., int],
    arguments: tuple[Any, ...],
    *,
    notes: Path,
    stop: threading.Event,
) -> None:
    """Run `entry(*arguments)` on this node's ranks; return when all ranks have returned.

    entry: of a module that the ranks can import; calls `note_start`, and returns an exit code when it ended as its
    stage foresees. notes: a folder for this launch alone. stop: set when the stage is asked to stop, which the ranks
    then are too. Raises StageInterrupted if they were, and else the error of the rank that ended the others, which
    names it.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    alone = parallel.nodes == 1
    host, port = ("localhost", 0) if alone else parallel.endpoint()
    notes.mkdir(parents=True, exist_ok=True)
    config = LaunchConfig(
        min_nodes=parallel.nodes,
        max_nodes=parallel.nodes,
        nproc_per_node=parallel.processes,
        run_id=notes.name if alone else _TORCHRUN_ID,
        rdzv_backend="c10d",
        rdzv_endpoint=f"{host}:{port}",
        rdzv_configs={"is_host": True},
        local_addr=host,
        max_restarts=0,
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(notes / "elastic")),
    )
    logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)  # what ended how is said below
    multiprocessing.set_forkserver_preload(_NEEDED)
    ended: dict[str, Any] = {}

    def agent() -> None:  # not in the main thread: there it would answer signals itself, by killing after 30 s
        try:
            ended["codes"] = elastic_launch(config, entry)(*arguments)
        except BaseException as error:
            ended["error"] = error

    thread = threading.Thread(target=agent, name="ranks", daemon=True)
    thread.start()
    told: set[int] = set()
    while thread.is_alive():
        thread.join(_POLL_S)
        if stop.is_set():
            for pid in _started(notes).keys() - told:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                told.add(pid)
            if not alone and not told and not multiprocessing.active_children():
                raise StageInterrupted("the stage was asked to stop while it waited for its other nodes")
    if "codes" not in ended:
        raise _cause(notes, ended["error"], parallel, stopped=stop.is_set())
    if EXIT_INTERRUPTED in ended["codes"].values():
        raise StageInterrupted("the stage was asked to stop: run the same command to continue from what it saved")


def _cause(notes: Path, error: BaseException, parallel: ParallelConfig, *, stopped: bool) -> DraftsmithError:
    """Return the one error that ended all ranks. Ranks that lose another one report that, which is no cause."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError

    world = parallel.world

    reports = [RankReport.read(path) for path in notes.glob("*.json")]
    reports.sort(key=lambda report: report.at)
    for report in reports:
        if report.exit_code in _KINDS:
            return _KINDS[report.exit_code](report.message)
    if stopped:
        return StageInterrupted("the stage was asked to stop: run the same command to continue from its checkpoint")
    silent = _silent(reports, world)
    who = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))} of {world}"
    if reports and _WAITED.search(reports[0].message) and silent:
        return RetryableError(
            f"{who} did not answer: rank {reports[0].rank} waited in vain ({reports[0].message}), and all "
            "were ended: the same command continues from the checkpoint"
        )
    if isinstance(error, ChildFailedError):
        failure = next(iter(error.failures.values()))
        rank = _started(notes).get(failure.pid, f"{failure.local_rank}, which had not begun,")
        if failure.exitcode < 0 or rank not in [str(report.rank) for report in reports]:
            why = _WHY_LOST.get(failure.exitcode, "")
            return RetryableError(
                f"rank {rank} of {world} was lost, with exit code {failure.exitcode}, and the others were ended: the "
                f"same command continues from the checkpoint{why}"
            )
    if reports and _CUT_OFF.search(reports[0].message) and silent:
        return RetryableError(
            f"{who}, on another node, ended without a report ({reports[0].message}). The log of `torchrun` there says "
            "why; the same command continues from the checkpoint."
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


def _silent(reports: Sequence[RankReport], world: int) -> list[int]:
    """Ranks that had nothing to report when the others ended: none that waits for others stays so."""
    return sorted(set(range(world)) - {report.rank for report in reports})
