"""The process group of a rank: gloo between processes, NCCL between GPUs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import Store

_FLOW = "draftsmith/flow"  # key of the ranks' store: what the node that runs the flow says


@contextmanager
def process_group(store: Store | None = None, rank: int = -1) -> Iterator[None]:
    """Meet the other ranks, as the launcher's environment says; each takes the GPU of its place on the machine.

    store, rank: as `meet` returns them; left out, the environment's.
    """
    import torch
    from torch import distributed as dist

    world = -1 if store is None else int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        # plain objects go through the host
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, store=store, rank=rank, world_size=world)
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    yield
    dist.destroy_process_group()  # not of one that failed: others may be gone


def meet(request: Mapping[str, Any] | None) -> tuple[Store, int, dict[str, Any]]:
    """Return the store of the ranks, the number of this one, and the request, which one node gives: the flow's.

    Its ranks are numbered first. torchrun numbers nodes by their host names.
    """
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if request is not None and int(os.environ["LOCAL_RANK"]) == 0:
        store.set(_FLOW, json.dumps({"rank": rank, "request": dict(request)}))
    flow = json.loads(store.get(_FLOW))
    return PrefixStore("ranks", store), (rank - flow["rank"]) % world, flow["request"]
