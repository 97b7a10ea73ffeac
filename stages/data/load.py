"""Stored artifacts as the numerical rooms take them."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.readers import RowReader
from draftsmith.artifacts.tables.schemas import PROMPTS, TRAJECTORIES
from draftsmith.stages.data.trajectories import TrajectoryRows
from draftsmith.stages.target.info import read_target_info
from draftsmith.stages.target.sampling import SamplingParams

DRAFTER_FOLDER = "drafter"  # inside the artifact of a training stage
_SAMPLING = ("temperature", "top_p", "top_k")  # columns


@dataclass(frozen=True)
class StoredTrajectories:
    """The usable trajectories of an artifact, in its order; their tokens stay on disk."""

    trajectories: TrajectoryRows
    prompt_ids: pa.Array
    sampling: SamplingParams  # that they were drawn with
    too_short: int  # answers of one token: nothing is drafted there

    def choose(self, indices: Sequence[int]) -> StoredTrajectories:
        """Return some of them, by index."""
        return replace(
            self, trajectories=self.trajectories.choose(indices), prompt_ids=self.prompt_ids.take(pa.array(indices))
        )

    @property
    def prompts(self) -> list[str]:
        """The prompt of each: answers to the same one are no independent observations."""
        names: list[str] = self.prompt_ids.to_pylist()
        return names


def load_trajectories(folder: Path, splits: Collection[str] | None = None) -> StoredTrajectories:
    """trajectories.parquet of an artifact, restricted to some splits.

    Raises DraftsmithError if nothing of these splits, nothing usable, or a mix of temperatures (top_p, top_k) is there.
    """
    path = folder / "trajectories.parquet"
    reader = RowReader(path, TRAJECTORIES)
    table = read_table(path, TRAJECTORIES, ["trajectory_id", "prompt_id", "split", *_SAMPLING])
    prompts, responses = _lengths(reader, "prompt_ids", "response_ids")
    wanted = np.ones(table.num_rows, dtype=bool)
    if splits is not None:
        wanted = pc.is_in(table["split"], value_set=pa.array(list(splits), pa.string())).to_numpy()
        if not wanted.any():
            there = sorted(table["split"].unique().to_pylist())
            raise DraftsmithError(
                f"{path}: no answer of split {' or '.join(splits)}, only of {', '.join(there)}; change fields "
                "splits and prompts of the section that made it"
            )
    places = np.flatnonzero(wanted & (responses >= 2))
    if not len(places):
        raise DraftsmithError(f"{path}: no answer of two or more tokens; check the prompts and max_new_tokens")
    of_sampling = {name: sorted(table[name].take(places).unique().to_pylist()) for name in _SAMPLING}
    for name, values in of_sampling.items():
        if len(values) > 1 and of_sampling["temperature"] != [0]:
            raise DraftsmithError(f"{path}: values {values} of {name} are mixed; roll out with one of them")
    ids, prompt_ids = (table[name].take(places).combine_chunks() for name in ("trajectory_id", "prompt_id"))
    lengths = prompts[places] + responses[places]
    rows = TrajectoryRows(reader, places, ids, lengths, prompts[places])
    sampling = SamplingParams(*(values[0] for values in of_sampling.values()))
    return StoredTrajectories(rows, prompt_ids, sampling, int(wanted.sum()) - len(places))


def _lengths(reader: RowReader, *columns: str) -> list[np.ndarray]:
    """Return [rows] numbers of tokens, for each column."""
    found: list[list[np.ndarray]] = [[np.zeros(0, dtype=np.int64)] for _ in columns]
    for part in reader.row_groups(list(columns)):
        for lengths, name in zip(found, columns, strict=True):
            lengths.append(pc.list_value_length(part[name]).to_numpy().astype(np.int64))
    return [np.concatenate(each) for each in found]


def splits_of(folder: Path) -> set[str]:
    """The splits that the trajectories of an artifact are of."""
    table = read_table(folder / "trajectories.parquet", TRAJECTORIES, ["split"])
    return set(table["split"].unique().to_pylist())


def sets_of(folder: Path, prompt_ids: Sequence[str]) -> list[str]:
    """The prompt set (its source) of each prompt, from an artifact of stage `prompts`; "logs" for others."""
    table = read_table(folder / "prompts.parquet", PROMPTS, ["prompt_id", "source"])
    known = dict(zip(table["prompt_id"].to_pylist(), table["source"].to_pylist(), strict=True))
    return [known.get(prompt_id, "logs") for prompt_id in prompt_ids]


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt."""

    prompt_id: str
    split: str
    token_ids: list[int]


@dataclass(frozen=True, eq=False)
class PromptRows(Sequence[Prompt]):
    """N rows of a table of prompts. Token ids are read when a prompt is asked for; its name and places stay in
    memory."""

    reader: RowReader  # of PROMPTS
    places: np.ndarray  # [N] rows of the table, ascending
    ids: list[str]  # [N]
    splits: list[str]  # [N]
    lengths: np.ndarray  # [N] tokens

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...

    @overload
    def __getitem__(self, index: slice) -> PromptRows: ...

    def __getitem__(self, index: int | slice) -> Prompt | PromptRows:
        if isinstance(index, slice):
            return PromptRows(self.reader, self.places[index], self.ids[index], self.splits[index], self.lengths[index])
        row = int(self.places[index])
        (tokens,) = self.reader.rows(row, row + 1, ["token_ids"])["token_ids"]
        return Prompt(self.ids[index], self.splits[index], tokens.values.to_pylist())


def load_prompts(folder: Path, splits: Collection[str]) -> PromptRows:
    """prompts.parquet of an artifact, in its order."""
    path = folder / "prompts.parquet"
    reader, wanted = RowReader(path, PROMPTS), pa.array(list(splits), pa.string())
    table = read_table(path, PROMPTS, ["prompt_id", "split"])
    places = np.flatnonzero(pc.is_in(table["split"], value_set=wanted).to_numpy())
    chosen = table.take(places)
    names = [sys.intern(split) for split in chosen["split"].to_pylist()]
    (lengths,) = _lengths(reader, "token_ids")
    return PromptRows(reader, places, chosen["prompt_id"].to_pylist(), names, lengths[places])


def positions_needed(prompts: Sequence[Prompt], max_new_tokens: int, max_positions: int) -> int:
    """Positions of the longest prompt with its answer. Raises DraftsmithError if the target's context is shorter."""
    lengths = prompts.lengths if isinstance(prompts, PromptRows) else [len(prompt.token_ids) for prompt in prompts]
    needed = int(max(lengths)) + max_new_tokens
    if needed > max_positions:
        raise DraftsmithError(
            f"the longest prompt and {max_new_tokens} new tokens need {needed} positions, the target has "
            f"{max_positions}; lower sampling.max_new_tokens or prompts.max_prompt_tokens"
        )
    return needed


def check_answer_fits(max_new_tokens: int, target: Path) -> None:
    """An answer alone must fit into the context. target: its artifact. Raises DraftsmithError."""
    limit = read_target_info(target).max_positions
    if max_new_tokens >= limit:
        raise DraftsmithError(
            f"sampling.max_new_tokens: {max_new_tokens} does not fit into the target's {limit} positions; lower it"
        )


def request_seed(seed: int, prompt_id: str, sample: int) -> int:
    """A request's own seed (63 bits): independent of which other prompts are in the run."""
    digest = hashlib.sha256(f"{seed}/{prompt_id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
