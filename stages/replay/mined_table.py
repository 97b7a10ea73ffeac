"""Mined steps as a table with a row per verify step: in shards on disk until the mining is done, and summarised."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from draftsmith.artifacts.tables.parquet import (
    BufferedShards,
    index_in,
    pad_lists,
    read_table,
    shard_paths,
)
from draftsmith.artifacts.tables.readers import KeyedRows, RowReader
from draftsmith.artifacts.tables.schemas import EVALUATED, VERIFY_STEPS
from draftsmith.stages.replay.replayer import MinedGroup
from draftsmith.stages.replay.step_tables import steps_table
from draftsmith.stages.runtime.stage import JsonObject

CERTAIN = 0.9  # the target's probability of its best token


class MiningMetrics:
    """Sums up verify steps from rows of VERIFY_STEPS, in any partition. Sums are divided once, at the end."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.steps = self._committed = self._errors = self._certain = 0
        self._verified, self._accepted_at = np.zeros((2, block_size - 1), dtype=np.int64)  # by offset
        self._accepted = np.zeros(block_size, dtype=np.int64)
        self._rejected, self._corrections = ValueCounts(), ValueCounts()

    def add(self, table: pa.Table) -> None:
        K = self.block_size - 1
        accepted = table["accepted"].to_numpy()
        verified = np.arange(K) < table["judged"].to_numpy()[:, None]
        wrong = np.flatnonzero(table["rejected_offset"].to_numpy())
        proposed = pad_lists(table, "proposed_ids", K, -1, np.int64)[
            wrong, accepted[wrong]
        ]  # the first after the accepted ones
        self.steps += table.num_rows
        self._committed += int(table["committed"].to_numpy().sum())
        self._errors += len(wrong)
        self._certain += int((np.exp(table["best_logprob"].to_numpy()[wrong]) >= CERTAIN).sum())
        self._verified += verified.sum(0)
        self._accepted_at += (verified & (np.arange(K) < accepted[:, None])).sum(0)
        self._accepted += np.bincount(accepted, minlength=K + 1)
        self._rejected.add(proposed)
        self._corrections.add(proposed << 32 | table["committed_id"].to_numpy()[wrong].astype(np.int64))

    def summary(self, tokenizer: Any) -> JsonObject:
        """Return the content of summary.json of stage `mining`, to which the stage adds the last fields."""
        rejected, corrections = self._rejected.most_common(20), self._corrections.most_common(20)
        return {
            "definition_of_tau": "committed tokens per verify step, with the target's own token (+1)",
            "tau": self._committed / self.steps,
            "steps": self.steps,
            "error_positions": self._errors,
            "certain_errors": {
                "at_least": CERTAIN,
                "share": self._certain / self._errors if self._errors else None,
            },
            "block_size": self.block_size,
            "acceptance_by_offset": [
                accepted / verified if verified else None
                for accepted, verified in zip(self._accepted_at.tolist(), self._verified.tolist(), strict=True)
            ],
            "accepted_histogram": self._accepted.tolist(),
            "most_rejected": [
                {"token": tokenizer.decode([token]), "id": token, "count": count} for token, count in rejected
            ],
            "most_frequent_corrections": [
                {
                    "proposed": tokenizer.decode([pair >> 32]),
                    "committed": tokenizer.decode([pair & 0xFFFFFFFF]),
                    "count": count,
                }
                for pair, count in corrections
            ],
        }


class ValueCounts:
    """Counts values, with 16 bytes for each distinct value of a batch."""

    def __init__(self) -> None:
        self._values, self._counts = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]

    def add(self, values: np.ndarray) -> None:
        distinct, first, counts = np.unique(values, return_index=True, return_counts=True)
        self._values.append(distinct[np.argsort(first)])
        self._counts.append(counts[np.argsort(first)])

    def most_common(self, count: int) -> list[tuple[int, int]]:
        """Return values and their counts, most frequent first; of equal counts, the value that occurred first."""
        distinct, first, inverse = np.unique(np.concatenate(self._values), return_index=True, return_inverse=True)
        counts = np.bincount(inverse, np.concatenate(self._counts), len(distinct)).astype(np.int64)
        order = np.lexsort((first, -counts))[:count]
        return list(zip(distinct[order].tolist(), counts[order].tolist(), strict=True))


_SHARD_STEPS = 1 << 16  # steps that wait for the next shard
# The table's order differs from that of the shards: a row group is read for a trajectory or two.
_GROUP_BYTES = 1 << 18
_SCHEMAS = {"evaluated_blocks": EVALUATED, "verify_steps": VERIFY_STEPS}
_TOTALS = ("evaluated_blocks", "outside_nucleus")  # columns of EVALUATED, per trajectory


class MinedShards(BufferedShards):
    """The mined groups of an unfinished mining on disk, so that a rerun continues after them."""

    def __init__(self, work: Path, done: Sequence[Path] = ()):
        """Open the shards in `work`. done: folders of other processes that together hold all groups, read instead."""
        super().__init__(work, _SCHEMAS, _GROUP_BYTES, most=_SHARD_STEPS)
        self._done = done

    def add_group(self, group: MinedGroup) -> None:
        """Add a group. It is on disk when the next shard is written."""
        totals = [
            {"trajectory_id": trajectory.trajectory_id, **{name: getattr(steps, name) for name in _TOTALS}}
            for trajectory, steps in group
        ]
        rows = steps_table(VERIFY_STEPS, group)
        self.add({"evaluated_blocks": totals, "verify_steps": rows}, rows.num_rows)

    def paths(self, name: str) -> list[Path]:
        if self._done:
            return [path for folder in self._done for path in shard_paths(folder / name)]
        return super().paths(name)

    def rows(self, ids: pa.Array) -> KeyedRows:
        """Return the steps of each trajectory, as far as they are on disk. ids: [N] names of the trajectories."""
        return KeyedRows(RowReader(self.paths("verify_steps"), VERIFY_STEPS, keep=32), ids)

    def totals(self, ids: pa.Array) -> dict[str, int]:
        """Return the blocks that were drafted for these trajectories, and their tokens outside the nucleus."""
        counts = np.zeros((len(_TOTALS), len(ids)), dtype=np.int64)
        for path in self.paths("evaluated_blocks"):  # by trajectory, so that one mined twice counts once
            table = read_table(path, EVALUATED)
            index = index_in(table, "trajectory_id", ids)
            for column, name in zip(counts, _TOTALS, strict=True):
                column[index[index >= 0]] = table[name].to_numpy()[index >= 0]
        return dict(zip(_TOTALS, counts.sum(1).tolist(), strict=True))
