"""Starting the ranks of a stage with torch's elastic launcher (what `torchrun` is made of), and how they ended.

Ranks belong to the process group of the stage, so that its lifeline ends them with it. A stage that is asked to stop
asks them; one that is lost ends all. They are forked from a server that has imported what they need: so that is read
once, however many they are.
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
from collections.abc import Callable, Sequence
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
from draftsmith.stages.contract import Parallel

_NOTES = "ranks"  # folder in `work`, with one for each launch: what of an earlier one still ends writes into its own
_POLL_S = 0.1
_ECHO_S = 3.0
_FITTING_S = 15.0  # for a node that can take part, where another one cannot
_OTHERS_S = 15.0  # for other nodes' word: one that lost a rank ends its others first, which wait for their echo
_NEEDED = ["torch.distributed", "transformers.modeling_utils", "draftsmith.stages.parallel.group"]
# gloo between processes, the watchdog of NCCL, and the store behind both: another rank did not come in time
_WAITED = re.compile(r"gloo.*timed out|collective operation timeout|DistStoreError.*(timed out|timeout)", re.IGNORECASE)
_KINDS = {kind.exit_code: kind for kind in (DraftsmithError, RetryableError, StageInterrupted)}
_WHY_LOST = {
    -signal.SIGKILL: "; memory that ran out is what most often kills: lower micro_batch_tokens",
    -signal.SIGABRT: "; NCCL ends a rank so that waited too long for another one, which may hang",
}


class RankFailedError(DraftsmithError):
    """Something unforeseen in a rank; its log says more."""

    exit_code = 1


@dataclass(frozen=True)
class Meeting:
    """Where the nodes of one launch find each other."""

    run_id: str
    endpoint: str = "localhost:0"  # HOST:PORT of the first node; 0: any, where there is no other
    node: int = 0  # which of them this is
    refusal: Callable[[], str | None] = lambda: None  # why a node cannot take part, while others are missing


@dataclass(frozen=True)
class RankReport:
    """What a rank says of the error that ends it."""

    rank: int
    message: str
    exit_code: int
    at: float = field(default_factory=time.time)  # seconds since the epoch

    def write(self, work: Path) -> None:
        """For the process that started it."""
        with suppress(OSError):  # the next attempt has begun, or the disk has no room for more than the file's name
            (_notes(work) / f"{self.rank}.json").write_text(json.dumps(asdict(self)), "utf-8")
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


def _notes(work: Path, run_id: str | None = None) -> Path:
    """run_id: of the launch; left out, of the one that this process is a rank of."""
    return work / _NOTES / (run_id or os.environ["TORCHELASTIC_RUN_ID"])


def note_start(work: Path, rank: int) -> None:
    """Which rank this process is, and that it hears signals: what is killed cannot say it."""
    (_notes(work) / f"{socket.gethostname()}.{os.getpid()}").write_text(str(rank), "utf-8")


def _started(notes: Path) -> dict[int, str]:
    """Process id -> rank, of this machine."""
    found = notes.glob(f"{socket.gethostname()}.*")
    return {int(path.name.rpartition(".")[2]): path.read_text("utf-8") for path in found}


def clear(work: Path) -> None:
    """Forget what ranks of earlier launches said."""
    shutil.rmtree(work / _NOTES, ignore_errors=True)


def launch(
    parallel: Parallel,
    entry: Callable[..., int],
    arguments: tuple[Any, ...],
    *,
    work: Path,
    meeting: Meeting,
    stop: threading.Event,
) -> None:
    """Run `entry(*arguments)` on this node's ranks; returns when all ranks have returned.

    entry: of a module that the ranks can import; calls `note_start`, and returns an exit code when it ended as its
    stage foresees. work: of the stage. stop: set when the stage is asked to stop, which the ranks then are too.
    Raises StageInterrupted if they were, and else the error of the rank that ended the others, which names it, or of a
    node that cannot take part, where no other one came in its place.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    alone, notes = parallel.nodes == 1, _notes(work, meeting.run_id)
    notes.mkdir(parents=True, exist_ok=True)
    config = LaunchConfig(
        min_nodes=parallel.nodes,
        max_nodes=parallel.nodes,
        nproc_per_node=parallel.processes,
        run_id=meeting.run_id,
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint=meeting.endpoint,
        rdzv_configs={} if alone else {"rank": meeting.node},
        local_addr="localhost" if alone else None,
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
    refused_at: float | None = None
    while thread.is_alive():
        thread.join(_POLL_S)
        if stop.is_set():
            for pid in _started(notes).keys() - told:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGTERM)
                told.add(pid)
            if not alone and not told and not multiprocessing.active_children():
                raise StageInterrupted("the stage was asked to stop while it waited for its other nodes")
        elif why := meeting.refusal():
            refused_at = refused_at or time.monotonic()
            if time.monotonic() - refused_at > _FITTING_S:
                raise DraftsmithError(f"parallel.nodes: {why}")
    if "codes" not in ended:
        cause = _cause(notes, ended["error"], parallel.world, stopped=stop.is_set())
        if meeting.node:
            _tell_first(notes, meeting.node, cause)
        elif isinstance(cause, RankFailedError) and not alone:  # perhaps the echo of what ended another node's rank
            cause = _told_by_others(notes, parallel.nodes) or cause
        raise cause
    if EXIT_INTERRUPTED in ended["codes"].values():
        raise StageInterrupted("the stage was asked to stop: run the same command to continue from what it saved")


def _tell_first(notes: Path, node: int, cause: DraftsmithError) -> None:
    """What ended the ranks of this node, for the first one."""
    note = notes / f"{node}.node"
    written = note.with_suffix(".tmp")
    with suppress(OSError):  # the next attempt has begun, or the disk is full
        written.write_text(json.dumps({"message": str(cause), "exit_code": cause.exit_code}), "utf-8")
        written.rename(note)


def _told_by_others(notes: Path, nodes: int) -> DraftsmithError | None:
    """The error that a node names as what ended its ranks, if it is no echo; waits for all, or for a while."""
    deadline = time.monotonic() + _OTHERS_S
    while True:
        found = [json.loads(path.read_text("utf-8")) for path in notes.glob("*.node")]
        for told in found:
            if told["exit_code"] in _KINDS:
                return _KINDS[told["exit_code"]](told["message"])
        if len(found) == nodes - 1 or time.monotonic() > deadline:
            return None
        time.sleep(_POLL_S)


def _cause(notes: Path, error: BaseException, world: int, *, stopped: bool) -> DraftsmithError:
    """The one error that ended all ranks. Those that lose another one report that they did, which is no cause."""
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    reports = [RankReport.read(path) for path in notes.glob("*.json")]
    reports.sort(key=lambda report: report.at)
    for report in reports:
        if report.exit_code in _KINDS:
            return _KINDS[report.exit_code](report.message)
    if stopped:
        return StageInterrupted("the stage was asked to stop: run the same command to continue from its checkpoint")
    if reports and _WAITED.search(reports[0].message) and (silent := _silent(reports, world)):
        who = f"rank{'s' * (len(silent) > 1)} {', '.join(map(str, silent))}"
        return RetryableError(
            f"{who} of {world} did not answer: rank {reports[0].rank} waited in vain ({reports[0].message}), and all "
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
    if reports:
        return RankFailedError(f"rank {reports[0].rank} of {world}: {reports[0].message}")
    return RankFailedError(f"the ranks could not be run: {type(error).__name__}: {error}")


def _silent(reports: Sequence[RankReport], world: int) -> list[int]:
    """Ranks that had nothing to report when the others ended: none that waits for others stays so."""
    return sorted(set(range(world)) - {report.rank for report in reports})
