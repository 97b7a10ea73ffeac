"""Rows that belong together (the steps of an answer), found in tables larger than memory by what they belong to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from draftsmith.artifacts.row_reader import RowReader

PART_ROWS = 1 << 15
_KEY = "trajectory_id"  # the column of the keys


class KeyedRows:
    """Where the rows of each of N keys lie: one run, the last one where attempts wrote several.

    Sixteen bytes a key stay in memory. A run begins where the column `counter` is 0; without one every row is a run.
    """

    def __init__(self, reader: RowReader, keys: pa.Array, counter: str | None = "step"):
        """keys: [N] strings, each a `trajectory_id`; rows of others are left out."""
        self._reader = reader
        begins, names = [np.zeros(0, dtype=np.int64)], [pa.array([], pa.string())]
        row = 0
        for part in reader.parts([_KEY] if counter is None else [_KEY, counter]):
            first = np.arange(part.num_rows) if counter is None else np.flatnonzero(part[counter].to_numpy() == 0)
            begins.append(row + first)
            names += part[_KEY].take(pa.array(first)).chunks
            row += part.num_rows
        starts = np.concatenate(begins)
        stops = np.append(starts[1:], row)
        place = pc.fill_null(pc.index_in(pa.chunked_array(names), value_set=keys), -1).to_numpy()
        wanted = place >= 0
        self.starts, self.stops = np.zeros((2, len(keys)), dtype=np.int64)
        # of a key that comes twice the last assignment holds
        self.starts[place[wanted]], self.stops[place[wanted]] = starts[wanted], stops[wanted]

    def leave_out(self, keys: np.ndarray) -> None:
        """keys: [N] bool, of which no row is wanted."""
        self.starts[keys] = self.stops[keys] = 0

    @property
    def counts(self) -> np.ndarray:
        """[N] rows of each key."""
        found: np.ndarray = self.stops - self.starts
        return found

    def key_of(self, rows: np.ndarray) -> np.ndarray:
        """[n] the keys that rows of the table belong to, -1 for those of none."""
        order = np.argsort(self.starts, kind="stable")
        order = order[self.counts[order] > 0]
        if not len(order):
            return np.full(len(rows), -1, dtype=np.int64)
        key = order[np.maximum(np.searchsorted(self.starts[order], rows, "right") - 1, 0)]
        return np.where((rows >= self.starts[key]) & (rows < self.stops[key]), key, -1)

    def of(self, indices: Sequence[int] | np.ndarray, columns: Sequence[str]) -> pa.Table:
        """The rows of some keys, in their order."""
        parts = [self._reader.rows(int(self.starts[i]), int(self.stops[i]), columns) for i in indices]
        return pa.concat_tables(parts) if parts else self._reader.rows(0, 0, columns)

    def in_order(self, columns: Sequence[str], rows: int = PART_ROWS) -> Iterator[pa.Table]:
        """The rows of all keys in their order, some whole keys of about `rows` rows at a time."""
        for indices in self.together(rows):
            yield self.of(indices, columns)

    def together(self, rows: int = PART_ROWS) -> Iterator[np.ndarray]:
        """Indices of keys that follow each other and have about `rows` rows (at least one key)."""
        ends = np.cumsum(self.counts)
        start = before = 0
        while start < len(ends):
            stop = max(start + 1, int(np.searchsorted(ends, before + rows, "right")))
            yield np.arange(start, stop)
            start, before = stop, int(ends[stop - 1])
