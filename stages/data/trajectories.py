"""Stored trajectories as a sequence: tokens are read on access, so that they never fill the memory all together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from draftsmith.artifacts.tables.readers import RowReader

if TYPE_CHECKING:  # plans and checks read trajectories without torch
    import torch


@dataclass(frozen=True)
class Trajectory:
    """A prompt and the target's answer."""

    trajectory_id: str
    tokens: list[int]  # prompt + answer
    prompt_length: int

    @property
    def first_anchor(self) -> int:
        """Return the first token of the answer: the target's prefill commits it before any drafting."""
        return self.prompt_length

    @property
    def last_anchor(self) -> int:
        """Return the last position that a token follows."""
        return len(self.tokens) - 2

    @property
    def answer_length(self) -> int:
        return len(self.tokens) - self.prompt_length


_COLUMNS = ("trajectory_id", "prompt_ids", "response_ids")


@dataclass(frozen=True, eq=False)
class TrajectoryRows(Sequence[Trajectory]):
    """N rows of a table of trajectories. Each takes its name and about twenty bytes of memory."""

    reader: RowReader  # of TRAJECTORIES
    places: np.ndarray  # [N] row numbers in the table, ascending unless they were selected in another order
    ids: pa.Array  # [N] strings
    lengths: np.ndarray  # [N] tokens of prompt and answer
    prompt_lengths: np.ndarray  # [N]

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Trajectory: ...

    @overload
    def __getitem__(self, index: slice) -> TrajectoryRows: ...

    def __getitem__(self, index: int | slice) -> Trajectory | TrajectoryRows:
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        row = int(self.places[index])
        name, prompt, answer = (column[0] for column in self.reader.rows(row, row + 1, _COLUMNS).columns)
        tokens = prompt.values.to_pylist() + answer.values.to_pylist()
        return Trajectory(name.as_py(), tokens, len(prompt.values))

    def select(self, indices: Sequence[int] | np.ndarray) -> TrajectoryRows:
        """Return the rows at these indices."""
        chosen = np.asarray(indices, dtype=np.int64)
        return TrajectoryRows(
            self.reader, self.places[chosen], self.ids.take(chosen), self.lengths[chosen], self.prompt_lengths[chosen]
        )

    def answers(self) -> Iterator[np.ndarray]:
        """Yield the tokens of all answers in the order of the table, some thousand answers concatenated at a time."""
        wanted = np.zeros(self.reader.num_rows, dtype=bool)
        wanted[self.places] = True
        start = 0
        for batch in self.reader.row_groups(["response_ids"]):
            chosen = batch.filter(pa.array(wanted[start : start + batch.num_rows]))
            start += batch.num_rows
            yield pc.list_flatten(chosen["response_ids"]).to_numpy()


def trajectory_lengths(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """Return [N] tokens of prompt and answer; stored trajectories are not read for it."""
    if isinstance(trajectories, TrajectoryRows):
        return trajectories.lengths
    return np.array([len(t.tokens) for t in trajectories], dtype=np.int64)


def trajectory_ids(trajectories: Sequence[Trajectory]) -> pa.Array:
    """Return [N] names as Arrow strings; stored trajectories are not read for it."""
    if isinstance(trajectories, TrajectoryRows):
        return trajectories.ids
    return pa.array([t.trajectory_id for t in trajectories], pa.string())


def answer_tokens(trajectories: Sequence[Trajectory]) -> Iterator[np.ndarray]:
    """Yield the tokens of all answers, one or several answers at a time."""
    if isinstance(trajectories, TrajectoryRows):
        yield from trajectories.answers()
    else:
        yield from (np.array(t.tokens[t.prompt_length :], dtype=np.int64) for t in trajectories)


def pad_tokens(trajectories: Sequence[Trajectory], device: torch.device, fill: int = 0) -> torch.Tensor:
    """Return token ids [B, T], padded on the right."""
    import torch  # as above

    width = max(len(t.tokens) for t in trajectories)
    return torch.tensor([t.tokens + [fill] * (width - len(t.tokens)) for t in trajectories], device=device)


def group_by_length(lengths: Sequence[int] | np.ndarray, tokens_per_group: int) -> Iterator[list[int]]:
    """Yield groups of indices of similar length, each with at most `tokens_per_group` tokens after padding."""
    group: list[int] = []
    for index in np.argsort(np.asarray(lengths, dtype=np.int64), kind="stable"):
        if group and (len(group) + 1) * int(lengths[index]) > tokens_per_group:
            yield group
            group = []
        group.append(int(index))
    if group:
        yield group
