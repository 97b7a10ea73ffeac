"""What the processes of one training tell each other: small objects, sums of gradients, whole weights.

A rank is one of them, numbered from 0; the first writes. Everything here must be called by all, in the same order.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed as dist

if TYPE_CHECKING:
    from torch.distributed import Store
T = TypeVar("T")
_BUCKET = 2**26  # bytes of gradients that are sent at once


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone by default, and then nothing is sent."""

    rank: int = 0
    world: int = 1
    target_parallel: int = 1  # neighbouring ranks that hold one copy of the target together

    @classmethod
    def current(cls, target_parallel: int = 1) -> Ranks:
        """Return this process's rank, as the launcher started it. target_parallel: of the training's config."""
        return cls(dist.get_rank(), dist.get_world_size(), target_parallel) if dist.is_initialized() else cls()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which alone writes checkpoints, metrics and the artifact."""
        return self.rank == 0

    @property
    def target_index(self) -> int:
        """The index of this rank among those that share its copy of the target."""
        return self.rank % self.target_parallel

    @property
    def target_group(self) -> range:
        """The ranks that hold this rank's copy of the target, itself included."""
        first = self.rank - self.target_index
        return range(first, first + self.target_parallel)

    def assigned_rows(self, lengths: Sequence[int], rank: int | None = None) -> list[int]:
        """Which rows of a step are this rank's, or another's, in order: dealt by their lengths, there and back, longest
        first.

        Every row is somebody's, and their numbers differ by one at most. Raises ValueError if a rank would have none.
        """
        if len(lengths) < self.world:
            raise ValueError(f"{len(lengths)} rows for {self.world} ranks")
        rank, dealt = self.rank if rank is None else rank, []
        for place, row in enumerate(sorted(range(len(lengths)), key=lambda row: -lengths[row])):
            turn, at = divmod(place, self.world)
            if (at if turn % 2 == 0 else self.world - 1 - at) == rank:
                dealt.append(row)
        return sorted(dealt)

    def gather(self, mine: T) -> list[T]:
        """What every rank says, in their order. Of host memory: it goes through pickle."""
        if self.world == 1:
            return [mine]
        said: list[T] = [mine] * self.world
        dist.all_gather_object(said, mine)
        return said

    def gather_in_target_group(self, mine: T) -> list[T]:
        """What every rank says with which this one shares the target, in their order."""
        if self.target_parallel == 1:
            return [mine]
        said = self.gather(mine)
        return [said[rank] for rank in self.target_group]

    def barrier(self) -> None:
        """Until all are here."""
        self.gather(None)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Every gradient becomes the sum of all ranks'; one that no rank has stays absent."""
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
            for p, part in zip(bucket, flat.split([p.numel() for p in bucket]), strict=True):
                _gradient(p).copy_(part.view_as(p))

    @torch.no_grad()
    def broadcast_weights(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """The first rank's weights, everywhere."""
        if self.world > 1:
            for parameter in parameters:
                dist.broadcast(parameter.data, src=0)


ALONE = Ranks()


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _buckets(parameters: Iterable[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Neighbours of one dtype, of so many bytes together."""
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bytes_ = parameter.numel() * parameter.element_size()
        if bucket and (size + bytes_ > _BUCKET or bucket[0].dtype != parameter.dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(parameter)
        size += bytes_
    if bucket:
        yield bucket


_FLOW = "draftsmith/flow"  # key of the ranks' store: what the node that runs the flow says


@contextmanager
def process_group(store: Store | None = None, rank: int = -1) -> Iterator[None]:
    """Meet the other ranks, as the launcher's environment says; each takes the GPU of its place on the machine.

    store, rank: as `rendezvous` returns them; left out, the environment's.
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


def rendezvous(request: Mapping[str, Any] | None) -> tuple[Store, int, dict[str, Any]]:
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
