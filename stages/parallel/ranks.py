"""What the processes of one training tell each other: small objects, sums of gradients, whole weights.

A rank is one of them, numbered from 0; the first writes. Everything here must be called by all, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import distributed as dist

T = TypeVar("T")
_BUCKET = 2**26  # bytes of gradients that are sent at once


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together; alone by default, and then nothing is sent."""

    rank: int = 0
    world: int = 1
    sharing: int = 1  # neighbours that hold one copy of the target together

    @classmethod
    def here(cls, sharing: int = 1) -> Ranks:
        """As the process was started. sharing: as the config of its training says, where it is one of several."""
        return cls(dist.get_rank(), dist.get_world_size(), sharing) if dist.is_initialized() else cls()

    @property
    def first(self) -> bool:
        """The one that writes what there is once: checkpoints, metrics, the artifact."""
        return self.rank == 0

    @property
    def place(self) -> int:
        """This one's among those with which it shares the target."""
        return self.rank % self.sharing

    @property
    def sharers(self) -> range:
        """The ranks that hold this one's copy of the target, itself included."""
        first = self.rank - self.place
        return range(first, first + self.sharing)

    def rows(self, lengths: Sequence[int], rank: int | None = None) -> list[int]:
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

    def gather_from_sharers(self, mine: T) -> list[T]:
        """What every rank says with which this one shares the target, in their order."""
        if self.sharing == 1:
            return [mine]
        said = self.gather(mine)
        return [said[rank] for rank in self.sharers]

    def wait(self) -> None:
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
    def same_weights(self, parameters: Iterable[torch.nn.Parameter]) -> None:
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
