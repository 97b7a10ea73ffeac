"""The node that runs the flow: it starts its own ranks, and tells nodes that wait at the rendezvous what to run."""

from __future__ import annotations

import json
import socket
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.contract import Parallel
from draftsmith.stages.parallel.launch import Meeting, clear, launch

# keys at the rendezvous
ASKED = "draftsmith/asked"  # the request, and the run of the launcher
NODES = "draftsmith/nodes"  # how many have joined a run
REFUSED = "draftsmith/refused"  # why a node cannot join a run


def run_ranks(
    parallel: Parallel,
    entry: Callable[..., int],
    request: Mapping[str, Any],
    events: str,
    stop: threading.Event,
) -> None:
    """Run `entry(request, events)` on all ranks. events: path that the first one, which is on this node, writes to.

    Raises as `launch` does, and DraftsmithError where a device is missing.
    """
    check_devices(parallel.processes)
    work = Path(request["work"])
    clear(work)
    with _meeting(parallel, request) as meeting:
        launch(parallel, entry, (dict(request), events), work=work, meeting=meeting, stop=stop)


def check_devices(processes: int) -> None:
    """Raises DraftsmithError where this node has GPUs, and fewer than processes."""
    import torch

    devices = torch.cuda.device_count()
    if 0 < devices < processes:
        raise DraftsmithError(
            f"parallel.processes: {processes} need a GPU each, and {devices} are here: lower it, or make more "
            "visible (CUDA_VISIBLE_DEVICES)"
        )


@contextmanager
def _meeting(parallel: Parallel, request: Mapping[str, Any]) -> Iterator[Meeting]:
    run_id = uuid.uuid4().hex
    if parallel.nodes == 1:
        yield Meeting(run_id)
        return
    from torch.distributed import DistNetworkError, TCPStore

    host, port = parallel.endpoint()
    try:
        store = [TCPStore(host, port, is_master=True, wait_for_workers=False)]  # a list: to let go of it
    except DistNetworkError as error:
        raise DraftsmithError(
            f"parallel.rendezvous: {host}:{port} cannot be opened here ({error}): name this machine and a free port"
        ) from error
    with socket.socket() as probe:
        probe.bind(("", 0))
        endpoint = f"{host}:{probe.getsockname()[1]}"
    asked = {
        "run_id": run_id,
        "endpoint": endpoint,
        "processes": parallel.processes,
        "nodes": parallel.nodes,
        "request": dict(request),
    }
    store[0].set(ASKED, json.dumps(asked))
    try:
        yield Meeting(run_id, endpoint, refusal=lambda: _refusal(store[0], run_id, parallel.nodes))
    finally:
        store.clear()  # its port is free for the next attempt


def _refusal(store: Any, run_id: str, nodes: int) -> str | None:
    """Why a node cannot join, as long as too few others have."""
    if store.add(f"{NODES}/{run_id}", 0) >= nodes - 1 or not store.check([f"{REFUSED}/{run_id}"]):
        return None
    why: str = store.get(f"{REFUSED}/{run_id}").decode()
    return why
