"""Stored trajectories as a sequence: tokens are read when one is asked for, so memory does not hold those of all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from draftsmith.artifacts.tables.readers import RowReader

if TYPE_CHECKING:  # plans and checks read trajectories without it
    import torch


@dataclass(frozen=True)
class Trajectory:
    """Prompt and response of the target."""

    trajectory_id: str
    tokens: list[int]  # prompt + response
    prompt_length: int

    @property
    def first_anchor(self) -> int:
        """The first response token: the target's prefill commits it before any drafting."""
        return self.prompt_length

    @property
    def last_anchor(self) -> int:
        """The last position with a token behind it."""
        return len(self.tokens) - 2

    @property
    def response_length(self) -> int:
        return len(self.tokens) - self.prompt_length


_COLUMNS = ("trajectory_id", "prompt_ids", "response_ids")


@dataclass(frozen=True, eq=False)
class TrajectoryRows(Sequence[Trajectory]):
    """N rows of a table of trajectories. Some twenty bytes and its name stay in memory of each."""

    reader: RowReader  # of TRAJECTORIES
    places: np.ndarray  # [N] rows of the table, ascending where the sequence is not a choice
    ids: pa.Array  # [N] strings
    lengths: np.ndarray  # [N] tokens of prompt and response
    prompt_lengths: np.ndarray  # [N]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...

    @overload
    def __getitem__(self, index: slice) -> TrajectoryRows: ...

    def __getitem__(self, index: int | slice) -> Trajectory | TrajectoryRows:
        if isinstance(index, slice):
            return self.choose(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = int(self.places[index])
        name, prompt, response = (column[0] for column in self.reader.rows(row, row + 1, _COLUMNS).columns)
        tokens = prompt.values.to_pylist() + response.values.to_pylist()
        return Trajectory(name.as_py(), tokens, len(prompt.values))

    def choose(self, indices: Sequence[int] | np.ndarray) -> TrajectoryRows:
        """Return some of the rows, by index."""
        chosen = np.asarray(indices, dtype=np.int64)
        return TrajectoryRows(
            self.reader, self.places[chosen], self.ids.take(chosen), self.lengths[chosen], self.prompt_lengths[chosen]
        )

    def responses(self) -> Iterator[np.ndarray]:
        """The response tokens of all, some thousand answers joined at a time, in the order of the table."""
        wanted = np.zeros(self.reader.num_rows, dtype=bool)
        wanted[self.places] = True
        start = 0
        for part in self.reader.row_groups(["response_ids"]):
            chosen = part.filter(pa.array(wanted[start : start + part.num_rows]))
            start += part.num_rows
            yield pc.list_flatten(chosen["response_ids"]).to_numpy()


def lengths_of(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """[N] tokens of prompt and response; of stored ones without reading them."""
    if isinstance(trajectories, TrajectoryRows):
        return trajectories.lengths
    return np.array([len(t.tokens) for t in trajectories], dtype=np.int64)


def ids_of(trajectories: Sequence[Trajectory]) -> pa.Array:
    """[N] names, as strings of Arrow; of stored ones without reading them."""
    if isinstance(trajectories, TrajectoryRows):
        return trajectories.ids
    return pa.array([t.trajectory_id for t in trajectories], pa.string())


def responses_of(trajectories: Sequence[Trajectory]) -> Iterator[np.ndarray]:
    """The response tokens of all, in parts."""
    if isinstance(trajectories, TrajectoryRows):
        yield from trajectories.responses()
    else:
        yield from (np.array(t.tokens[t.prompt_length :], dtype=np.int64) for t in trajectories)


def pad_tokens(trajectories: Sequence[Trajectory], device: torch.device, fill: int = 0) -> torch.Tensor:
    """Token ids [B, T], padded on the right."""
    import torch

    width = max(len(t.tokens) for t in trajectories)
    return torch.tensor([t.tokens + [fill] * (width - len(t.tokens)) for t in trajectories], device=device)


def groups_by_length(lengths: Sequence[int] | np.ndarray, tokens_per_group: int) -> Iterator[list[int]]:
    """Indices grouped by similar length, each group at most `tokens_per_group` tokens after padding. Deterministic."""
    group: list[int] = []
    for index in np.argsort(np.asarray(lengths, dtype=np.int64), kind="stable"):
        if group and (len(group) + 1) * int(lengths[index]) > tokens_per_group:
            yield group
            group = []
        group.append(int(index))
    if group:
        yield group
