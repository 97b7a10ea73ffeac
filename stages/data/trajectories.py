"""Trajectories (a prompt and its answer), in memory and as artifacts store them."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.readers import RowReader
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.targets.sampling import SamplingParams

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Trajectory:
    """A prompt and the target's answer."""

    trajectory_id: str
    tokens: list[int] = field(repr=False)  # prompt + answer
    prompt_length: int

    @property
    def first_anchor(self) -> int:
        """Return the position of the answer's first token, which the target's prefill commits before any drafting."""
        return self.prompt_length

    @property
    def last_anchor(self) -> int:
        """Return the last position that is followed by a token."""
        return len(self.tokens) - 2

    @property
    def answer_length(self) -> int:
        return len(self.tokens) - self.prompt_length


TOKEN_COLUMNS = ("prompt_ids", "response_ids")


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
        prompt, answer = (column[0].values for column in self.reader.rows(row, row + 1, TOKEN_COLUMNS).columns)
        tokens = prompt.to_numpy().tolist() + answer.to_numpy().tolist()
        return Trajectory(self.ids[index].as_py(), tokens, len(prompt))

    def select(self, indices: Sequence[int] | np.ndarray) -> TrajectoryRows:
        chosen = np.asarray(indices, dtype=np.int64)
        lengths, prompt_lengths = self.lengths[chosen], self.prompt_lengths[chosen]
        return TrajectoryRows(self.reader, self.places[chosen], self.ids.take(chosen), lengths, prompt_lengths)

    def answers(self) -> Iterator[np.ndarray]:
        """Yield the tokens of all answers in the order of the table, some thousand answers concatenated at a time."""
        selected = np.zeros(self.reader.num_rows, dtype=bool)
        selected[self.places] = True
        start = 0
        for batch in self.reader.row_groups(["response_ids"]):
            chosen = batch.filter(pa.array(selected[start : start + batch.num_rows]))
            start += batch.num_rows
            yield pc.list_flatten(chosen["response_ids"]).to_numpy()


def trajectory_lengths(trajectories: Sequence[Trajectory]) -> np.ndarray:
    """Return [N] token counts of prompt and answer, without reading stored trajectories."""
    if isinstance(trajectories, TrajectoryRows):
        return trajectories.lengths
    return np.array([len(t.tokens) for t in trajectories], dtype=np.int64)


def trajectory_ids(trajectories: Sequence[Trajectory]) -> pa.Array:
    """Return [N] names as Arrow strings, without reading stored trajectories."""
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
    ids = np.full((len(trajectories), max(len(t.tokens) for t in trajectories)), fill, dtype=np.int64)
    for row, trajectory in zip(ids, trajectories, strict=True):
        row[: len(trajectory.tokens)] = trajectory.tokens
    return to_device(ids, device)


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


DRAFTER_FOLDER = "drafter"  # inside the artifact of a training stage
_SAMPLING = ("temperature", "top_p", "top_k")  # columns


@dataclass(frozen=True)
class StoredTrajectories:
    """The usable trajectories of an artifact, in its order; their tokens stay on disk."""

    trajectories: TrajectoryRows
    prompt_ids: pa.Array
    sampling: SamplingParams  # of the answers
    too_short: int  # number of excluded answers of one token, on which nothing can be drafted

    def select(self, indices: Sequence[int]) -> StoredTrajectories:
        return replace(
            self, trajectories=self.trajectories.select(indices), prompt_ids=self.prompt_ids.take(pa.array(indices))
        )

    @property
    def prompts(self) -> list[str]:
        """Return the prompt of each trajectory. Answers to the same prompt are not independent."""
        names: list[str] = self.prompt_ids.to_pylist()
        return names


def load_trajectories(
    folder: Path, splits: Collection[str] | None = None, reader: RowReader | None = None
) -> StoredTrajectories:
    """Load the trajectories of an artifact, or those of some splits.

    reader: a reader of `trajectories.parquet`; by default, one that decodes the row group of an answer on each access.
    Raises DraftsmithError if there is no usable answer, or if temperature, top_p or top_k differ between answers.
    """
    path = folder / "trajectories.parquet"
    reader = reader or RowReader(path, TRAJECTORIES)
    table = read_table(path, TRAJECTORIES, ["trajectory_id", "prompt_id", "split", *_SAMPLING])
    prompts, answers = list_lengths(reader, *TOKEN_COLUMNS)
    selected = np.ones(table.num_rows, dtype=bool)
    if splits is not None:
        selected = pc.is_in(table["split"], value_set=pa.array(list(splits), pa.string())).to_numpy()
        if not selected.any():
            present = sorted(table["split"].unique().to_pylist())
            raise DraftsmithError(
                f"{path} has no answer of split {' or '.join(splits)}, only of {', '.join(present)}. Change fields "
                "splits and prompts of the section that made it."
            )
    places = np.flatnonzero(selected & (answers >= 2))
    if not len(places):
        raise DraftsmithError(f"{path} has no answer of two or more tokens. Check the prompts and max_new_tokens.")
    values_of = {name: sorted(table[name].take(places).unique().to_pylist()) for name in _SAMPLING}
    for name, values in values_of.items():
        if len(values) > 1 and values_of["temperature"] != [0]:
            raise DraftsmithError(f"{path} mixes the values {values} of {name}. Roll out with one of them.")
    ids, prompt_ids = (table[name].take(places).combine_chunks() for name in ("trajectory_id", "prompt_id"))
    lengths = prompts[places] + answers[places]
    rows = TrajectoryRows(reader, places, ids, lengths, prompts[places])
    sampling = SamplingParams(*(values[0] for values in values_of.values()))
    return StoredTrajectories(rows, prompt_ids, sampling, int(selected.sum()) - len(places))


def list_lengths(reader: RowReader, *columns: str) -> list[np.ndarray]:
    """Return [rows] numbers of tokens in each of these columns of lists."""
    counts: list[list[np.ndarray]] = [[np.zeros(0, dtype=np.int64)] for _ in columns]
    for batch in reader.row_groups(list(columns)):
        for lengths, name in zip(counts, columns, strict=True):
            lengths.append(pc.list_value_length(batch[name]).to_numpy().astype(np.int64))
    return [np.concatenate(lengths) for lengths in counts]


def stored_splits(folder: Path) -> set[str]:
    """Return the splits that occur in the trajectories of an artifact."""
    table = read_table(folder / "trajectories.parquet", TRAJECTORIES, ["split"])
    return set(table["split"].unique().to_pylist())


def request_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Return the seed of a request (63 bits), which does not depend on the other prompts of the run."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def random_rank(seed: int, content: bytes) -> int:
    """Return 63 bits by which to order items at random, from only the seed and the item's content."""
    return int.from_bytes(hashlib.sha256(f"lot {seed} ".encode() + content).digest()[:8], "big") >> 1
