"""Stores the steps of an unfinished mining on disk in a few large files, so that a rerun goes on after them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa

from draftsmith.artifacts.tables.parquet import TableShards, index_in, read_table, shard_paths
from draftsmith.artifacts.tables.readers import KeyedRows, RowReader
from draftsmith.artifacts.tables.schemas import EVALUATED, VERIFY_STEPS
from draftsmith.stages.replay.mined_table import steps_table
from draftsmith.stages.replay.replayer import MinedGroup

SHARD_STEPS = 1 << 16  # a shard is written when this many steps wait,
SHARD_SECONDS = 60.0  # or when the first of them has waited this long: a kill loses no more
# The table is in another order than the shards: a row group is read for a trajectory or two.
_GROUP_BYTES = 1 << 18
_SCHEMAS = {"evaluated_blocks": EVALUATED, "verify_steps": VERIFY_STEPS}
_TOTALS = ("evaluated_blocks", "outside_nucleus")  # of each trajectory, columns of EVALUATED


class MinedShards:
    """Mined groups on disk in `work`. A context manager: groups that wait are written when the block ends."""

    def __init__(self, work: Path, done: Sequence[Path] = ()):
        """done: folders of other processes that together hold all groups; they are read instead of `work`."""
        self._parts, self._done = TableShards(work, _SCHEMAS, _GROUP_BYTES), done
        self._waiting: list[MinedGroup] = []
        self._count, self._since = 0, 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._write()

    def add(self, group: MinedGroup) -> None:
        """Add a group. It is on disk when the next shard is written."""
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting.append(group)
        self._count += sum(len(trace.anchors) for trace in group.traces)
        if self._count >= SHARD_STEPS or time.monotonic() - self._since >= SHARD_SECONDS:
            self._write()

    def _write(self) -> None:
        if self._waiting:
            members = [each for group in self._waiting for each in zip(group.trajectories, group.traces, strict=True)]
            totals = [
                {"trajectory_id": t.trajectory_id, **{name: getattr(trace, name) for name in _TOTALS}}
                for t, trace in members
            ]
            steps = pa.concat_tables([steps_table(group) for group in self._waiting])
            self._parts.append({"evaluated_blocks": totals, "verify_steps": steps})
        self._waiting, self._count = [], 0

    def _paths(self, name: str) -> list[Path]:
        if self._done:
            return [path for folder in self._done for path in shard_paths(folder / name)]
        return self._parts.paths(name)

    def rows(self, ids: pa.Array) -> KeyedRows:
        """Return the steps of each trajectory, as far as they are on disk. ids: [N] names of the trajectories."""
        return KeyedRows(RowReader(self._paths("verify_steps"), VERIFY_STEPS, keep=32), ids)

    def totals(self, ids: pa.Array) -> dict[str, int]:
        """Return the blocks that were drafted for these trajectories, and their tokens outside the nucleus."""
        counts = np.zeros((len(_TOTALS), len(ids)), dtype=np.int64)
        for path in self._paths("evaluated_blocks"):  # by trajectory: one that was mined again is not counted twice
            table = read_table(path, EVALUATED)
            index = index_in(table, "trajectory_id", ids)
            for of_name, name in zip(counts, _TOTALS, strict=True):
                of_name[index[index >= 0]] = table[name].to_numpy()[index >= 0]
        return dict(zip(_TOTALS, counts.sum(1).tolist(), strict=True))
