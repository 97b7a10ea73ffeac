"""One more node of a training: `python -m draftsmith.stages.join [HOST:PORT]` runs the ranks that are asked for there.

The node with the flow opens the rendezvous when a stage begins that wants several nodes; this command waits for that,
runs its ranks, and waits again, until it is terminated. All nodes see the same disk under the same paths. One that
cannot take part says so there, and takes no place.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.redaction import redact_logs
from draftsmith.stages.parallel.config import RENDEZVOUS, ParallelConfig, endpoint_of
from draftsmith.stages.parallel.head import ASKED, NODES, REFUSED, check_devices
from draftsmith.stages.parallel.launch import Meeting, launch
from draftsmith.stages.process import run_rank, stop_when_asked, use_threads

_WAIT_S = 1.0
_ANSWER = timedelta(seconds=20)


def join(host: str, port: int, stop: threading.Event) -> None:
    """Run what is asked for at the rendezvous until `stop` is set; errors are told and end nothing but the stage."""
    done = ""
    print(f"waiting at {host}:{port}", file=sys.stderr)
    while not stop.is_set():
        asked = _asked(host, port, done)
        if asked is None:
            stop.wait(_WAIT_S)
            continue
        done, request = asked["run_id"], asked["request"]
        try:
            if "refusal" in asked:
                raise asked["refusal"]
            print(f"stage {request['stage']}: joining as node {asked['node']} of {asked['nodes']}", file=sys.stderr)
            _run(asked, stop)
        except DraftsmithError as error:
            print(f"stage {request['stage']}: {error}", file=sys.stderr)


def _asked(host: str, port: int, done: str) -> dict[str, Any] | None:
    """What the first node asks for, with the number of this one, or with the error why this one can have none.

    None: nothing that was not done before, or was not taken by enough others.
    """
    from torch.distributed import DistError, TCPStore

    try:
        socket.create_connection((host, port), timeout=_WAIT_S).close()  # torch would warn at every attempt
        store = TCPStore(host, port, is_master=False, timeout=_ANSWER)
        asked: dict[str, Any] = json.loads(store.get(ASKED))
        if asked["run_id"] == done:
            return None
        try:
            _check_fit(asked)
        except DraftsmithError as error:
            store.set(f"{REFUSED}/{asked['run_id']}", f"{socket.gethostname()} cannot join: {error}")
            return {**asked, "refusal": error}
        node = store.add(f"{NODES}/{asked['run_id']}", 1)
        return {**asked, "node": node} if node < asked["nodes"] else None  # others were here first
    except (OSError, DistError):
        return None


def _check_fit(asked: dict[str, Any]) -> None:
    """Raises DraftsmithError where this node does not see the stage's folder, or has too few GPUs."""
    if not (work := Path(asked["request"]["work"])).is_dir():
        raise DraftsmithError(f"{work} is not on this node: all nodes must see DRAFTSMITH_HOME under the same path")
    check_devices(asked["processes"])


def _run(asked: dict[str, Any], stop: threading.Event) -> None:
    parallel = ParallelConfig(processes=asked["processes"], nodes=asked["nodes"])
    request = asked["request"]
    work = Path(request["work"])
    use_threads(max(1, int(request.get("threads") or os.cpu_count() or 1) // parallel.processes))
    meeting = Meeting(asked["run_id"], asked["endpoint"], asked["node"])
    launch(parallel, run_rank, (request, os.devnull), work=work, meeting=meeting, stop=stop)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m draftsmith.stages.join", description="Run the ranks of trainings that are asked for elsewhere."
    )
    parser.add_argument("rendezvous", nargs="?", help=f"HOST:PORT of the node with the flow; left out: ${RENDEZVOUS}")
    options = parser.parse_args(arguments)
    redact_logs()
    try:
        host, port = endpoint_of(options.rendezvous or os.environ.get(RENDEZVOUS))
    except DraftsmithError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    join(host, port, stop_when_asked())
    return 0


if __name__ == "__main__":
    sys.exit(main())
