"""Communication between the ranks of one training: small objects, sums of gradients, whole weights.

Ranks are numbered from 0; rank 0 writes. All ranks must call everything here, in the same order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import distributed as dist

from draftsmith.stages.runtime.stage import StageRequest

T = TypeVar("T")
_BUCKET_BYTES = 2**26  # bytes of gradients in one all-reduce


@dataclass(frozen=True)
class Ranks:
    """This process's place among the ranks of its training. By default it is the only rank, and nothing is sent."""

    rank: int = 0
    world: int = 1
    target_parallel: int = 1  # neighbouring ranks that hold one copy of the target together

    @classmethod
    def current(cls, target_parallel: int = 1) -> Ranks:
        """Return the ranks as the launcher started them. target_parallel: as in the training's config."""
        return cls(dist.get_rank(), dist.get_world_size(), target_parallel) if dist.is_initialized() else cls()

    @property
    def is_main(self) -> bool:
        """Return whether this is rank 0, the only one that writes checkpoints, metrics and the artifact."""
        return self.rank == 0

    @property
    def target_index(self) -> int:
        """Return the index of this rank among those that share its copy of the target."""
        return self.rank % self.target_parallel

    @property
    def target_group(self) -> range:
        """Return the ranks that hold this rank's copy of the target, itself included."""
        first = self.rank - self.target_index
        return range(first, first + self.target_parallel)

    def assigned_rows(self, lengths: Sequence[int], rank: int | None = None) -> list[int]:
        """Return the rows of a step that this rank, or rank `rank`, computes, in ascending order.

        Rows are dealt out by length, longest first, in rank order and back. Every row has one rank, and the ranks'
        counts differ by at most one. Raises ValueError if a rank would have none.
        """
        if len(lengths) < self.world:
            raise ValueError(f"{len(lengths)} rows for {self.world} ranks")
        rank, rows = self.rank if rank is None else rank, []
        for index, row in enumerate(sorted(range(len(lengths)), key=lambda row: -lengths[row])):
            lap, offset = divmod(index, self.world)
            if (offset if lap % 2 == 0 else self.world - 1 - offset) == rank:
                rows.append(row)
        return sorted(rows)

    def gather(self, mine: T) -> list[T]:
        """Return every rank's object, in the order of the ranks. Objects are pickled: tensors must be on the CPU."""
        if self.world == 1:
            return [mine]
        objects: list[T] = [mine] * self.world
        dist.all_gather_object(objects, mine)
        return objects

    def gather_in_target_group(self, mine: T) -> list[T]:
        """Return the objects of the ranks that share this rank's copy of the target, in their order."""
        if self.target_parallel == 1:
            return [mine]
        objects = self.gather(mine)
        return [objects[rank] for rank in self.target_group]

    def barrier(self) -> None:
        self.gather(None)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Replace every gradient by its sum over all ranks; a gradient that no rank has stays None."""
        if self.world == 1:
            return
        trained = list(parameters)
        present = self.gather([p.grad is not None for p in trained])
        used = [p for p, *ranks in zip(trained, *present, strict=True) if any(ranks)]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        for bucket in _buckets(used):
            flat = torch.cat([_gradient(p).flatten() for p in bucket])
            dist.all_reduce(flat)
            for p, gradient in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                _gradient(p).copy_(gradient.view_as(p))

    @torch.no_grad()
    def broadcast_weights(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Copy the weights of rank 0 to all ranks."""
        if self.world > 1:
            for parameter in parameters:
                dist.broadcast(parameter.data, src=0)


ALONE = Ranks()


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Yield runs of consecutive parameters that have one dtype and fit into a bucket."""
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bytes_ = parameter.numel() * parameter.element_size()
        if bucket and (size + bytes_ > _BUCKET_BYTES or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += bytes_
    if bucket:
        yield bucket


_FLOW = "draftsmith/flow"  # key in the ranks' store: the data that the flow's node sends


@contextmanager
def process_group(store: dist.Store | None = None, rank: int = -1) -> Iterator[None]:
    """Join the process group that the launcher's environment describes; each rank takes the GPU of its local rank.

    store, rank: as `rendezvous` returns them; by default taken from the environment.
    """
    world = -1 if store is None else int(os.environ["WORLD_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        # gloo: for objects, which stay in host memory
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, store=store, rank=rank, world_size=world)
    else:
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    yield
    dist.destroy_process_group()  # not after an error: other ranks may be lost


def rendezvous(request: StageRequest | None, notes: Path | None) -> tuple[dist.Store, int, StageRequest, Path]:
    """Return the ranks' store, this rank's number, and the request and notes folder, which the flow's node sends.

    The ranks of the flow's node come first, although torchrun numbers nodes by their host names. request, notes: None
    on a node other than the flow's.
    """
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if request is not None and int(os.environ["LOCAL_RANK"]) == 0:
        store.set(_FLOW, json.dumps({"rank": rank, "request": request.model_dump(mode="json"), "notes": str(notes)}))
    flow = json.loads(store.get(_FLOW))
    request = StageRequest.model_validate(flow["request"])
    return dist.PrefixStore("ranks", store), (rank - flow["rank"]) % world, request, Path(flow["notes"])
