"""The process group of a rank: gloo between processes, NCCL between GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def process_group() -> Iterator[None]:
    """Meet the other ranks, as the launcher's environment says; each takes the GPU of its place on the machine."""
    import torch
    from torch import distributed as dist

    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)  # plain objects go through the host
    else:
        dist.init_process_group("gloo")
    yield
    dist.destroy_process_group()  # not of one that failed: others may be gone
