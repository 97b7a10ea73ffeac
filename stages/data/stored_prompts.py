"""The prompts of an artifact of stage `prompts`: their tokens, slices, and the room that answers to them need."""

from __future__ import annotations

import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import read_table
from draftsmith.artifacts.tables.readers import RowReader
from draftsmith.artifacts.tables.schemas import LABELS, LOGS_SET, PROMPTS
from draftsmith.stages.data.trajectories import list_lengths
from draftsmith.stages.targets.info import read_target_info


def prompt_labels(folder: Path, prompt_ids: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the slices of each prompt, from an artifact of stage `prompts`.

    The first one is its set: the source, or "logs" for a prompt that the artifact does not have.
    """
    table = read_table(folder / "prompts.parquet", PROMPTS, ["prompt_id", "source"])
    sources = dict(zip(table["prompt_id"].to_pylist(), table["source"].to_pylist(), strict=True))
    labels: dict[str, list[str]] = {}
    if (path := folder / "labels.parquet").is_file():
        table = read_table(path, LABELS)
        labels = dict(zip(table["prompt_id"].to_pylist(), table["labels"].to_pylist(), strict=True))
    return [(sources.get(prompt_id, LOGS_SET), *labels.get(prompt_id, ())) for prompt_id in prompt_ids]


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt."""

    prompt_id: str
    token_ids: list[int]


@dataclass(frozen=True, eq=False)
class PromptRows(Sequence[Prompt]):
    """N rows of a table of prompts. Token ids are read on access; the other columns stay in memory."""

    reader: RowReader  # of PROMPTS
    places: np.ndarray  # [N] row numbers in the table, ascending
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
            places, lengths = self.places[index], self.lengths[index]
            return PromptRows(self.reader, places, self.ids[index], self.splits[index], lengths)
        row = int(self.places[index])
        (tokens,) = self.reader.rows(row, row + 1, ["token_ids"])["token_ids"]
        return Prompt(self.ids[index], tokens.values.to_pylist())


def load_prompts(folder: Path, splits: Collection[str]) -> PromptRows:
    """Load the prompts of some splits from `prompts.parquet` of an artifact, in its order."""
    path = folder / "prompts.parquet"
    reader, names_of_splits = RowReader(path, PROMPTS), pa.array(list(splits), pa.string())
    table = read_table(path, PROMPTS, ["prompt_id", "split"])
    places = np.flatnonzero(pc.is_in(table["split"], value_set=names_of_splits).to_numpy())
    chosen = table.take(places)
    names = [sys.intern(split) for split in chosen["split"].to_pylist()]
    (lengths,) = list_lengths(reader, "token_ids")
    return PromptRows(reader, places, chosen["prompt_id"].to_pylist(), names, lengths[places])


def positions_needed(prompts: Sequence[Prompt], max_new_tokens: int, max_positions: int) -> int:
    """Return the number of positions that the longest prompt takes with its answer.

    Raises DraftsmithError if the target's context (`max_positions`) is shorter.
    """
    lengths = prompts.lengths if isinstance(prompts, PromptRows) else [len(prompt.token_ids) for prompt in prompts]
    needed = int(max(lengths)) + max_new_tokens
    if needed > max_positions:
        raise DraftsmithError(
            f"the longest prompt and {max_new_tokens} new tokens need {needed} positions, but the target has "
            f"{max_positions}. Lower sampling.max_new_tokens or prompts.max_prompt_tokens."
        )
    return needed


def check_answer_fits(max_new_tokens: int, target: Path) -> None:
    """Raise DraftsmithError if an answer alone does not fit into the context. target: folder of its artifact."""
    limit = read_target_info(target).max_positions
    if max_new_tokens >= limit:
        raise DraftsmithError(
            f"sampling.max_new_tokens: {max_new_tokens} does not fit into the target's {limit} positions. Lower it."
        )
