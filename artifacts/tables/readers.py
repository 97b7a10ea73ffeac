"""Rows of tables larger than memory: by range, with a few decoded row groups in memory, or all in turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from draftsmith.artifacts.tables.parquet import open_table, table_errors
from draftsmith.artifacts.tables.schemas import TableSchema

_OPEN_FILES = 16


class RowReader:
    """The rows of one table, or of the shards of one, numbered through.

    Rows that lie together are read together: a call costs the row groups that it touches, unless they are among the
    `keep` that were used last. Memory does not depend on how many rows there are but for a table of row groups.
    """

    def __init__(self, paths: Path | Sequence[Path], schema: TableSchema, *, keep: int = 4) -> None:
        """Raises DraftsmithError, as reading does, for a file that is damaged or of another schema."""
        self._paths = [paths] if isinstance(paths, Path) else list(paths)
        self._schema, self._keep = schema, keep
        files: list[int] = []
        groups: list[int] = []
        counts: list[int] = []
        for file, path in enumerate(self._paths):
            with table_errors(path), open_table(path, schema) as opened:
                rows = [opened.metadata.row_group(g).num_rows for g in range(opened.num_row_groups)]
            files += [file] * len(rows)
            groups += range(len(rows))
            counts += rows
        self._files, self._groups = np.array(files, dtype=np.int64), np.array(groups, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])  # of row groups, and the end
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._decoded: OrderedDict[tuple[int, tuple[str, ...]], pa.Table] = OrderedDict()

    @property
    def num_rows(self) -> int:
        return int(self._starts[-1])

    def file_index(self, rows: np.ndarray) -> np.ndarray:
        """[n] which of the paths holds each of these rows."""
        group = np.searchsorted(self._starts, rows, "right") - 1
        found: np.ndarray = np.append(self._files, -1)[np.minimum(group, len(self._files))]
        return found

    def rows(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Rows start … stop - 1."""
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        parts = []
        for place in range(first, len(self._groups)):
            begin, end = int(self._starts[place]), int(self._starts[place + 1])
            if begin >= stop:
                break
            group = self._group(place, tuple(columns))
            parts.append(group.slice(max(start - begin, 0), min(stop, end) - max(start, begin)))
        if not parts:
            return self._schema.with_metadata.empty_table().select(list(columns))
        return pa.concat_tables(parts)

    def parts(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """All rows in order, a row group at a time."""
        for place in range(len(self._groups)):
            yield self._read(place, columns)

    def _group(self, place: int, columns: tuple[str, ...]) -> pa.Table:
        key = (place, columns)
        if key not in self._decoded:
            self._decoded[key] = self._read(place, columns)
            while len(self._decoded) > self._keep:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(key)
        return self._decoded[key]

    def _read(self, place: int, columns: Sequence[str]) -> pa.Table:
        file = int(self._files[place])
        with table_errors(self._paths[file]):
            if file not in self._open:
                self._open[file] = open_table(self._paths[file], self._schema)
                while len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)[1].close()
            self._open.move_to_end(file)
            return self._open[file].read_row_group(int(self._groups[place]), list(columns), use_threads=False)


BATCH_ROWS = 1 << 15
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

    def exclude(self, keys: np.ndarray) -> None:
        """keys: [N] bool, of which no row is wanted."""
        self.starts[keys] = self.stops[keys] = 0

    @property
    def counts(self) -> np.ndarray:
        """[N] rows of each key."""
        found: np.ndarray = self.stops - self.starts
        return found

    def key_index(self, rows: np.ndarray) -> np.ndarray:
        """[n] the keys that rows of the table belong to, -1 for those of none."""
        order = np.argsort(self.starts, kind="stable")
        order = order[self.counts[order] > 0]
        if not len(order):
            return np.full(len(rows), -1, dtype=np.int64)
        key = order[np.maximum(np.searchsorted(self.starts[order], rows, "right") - 1, 0)]
        return np.where((rows >= self.starts[key]) & (rows < self.stops[key]), key, -1)

    def take(self, indices: Sequence[int] | np.ndarray, columns: Sequence[str]) -> pa.Table:
        """The rows of some keys, in their order."""
        parts = [self._reader.rows(int(self.starts[i]), int(self.stops[i]), columns) for i in indices]
        return pa.concat_tables(parts) if parts else self._reader.rows(0, 0, columns)

    def batches(self, columns: Sequence[str], rows: int = BATCH_ROWS) -> Iterator[pa.Table]:
        """The rows of all keys in their order, some whole keys of about `rows` rows at a time."""
        for indices in self.batch_indices(rows):
            yield self.take(indices, columns)

    def batch_indices(self, rows: int = BATCH_ROWS) -> Iterator[np.ndarray]:
        """Indices of keys that follow each other and have about `rows` rows (at least one key)."""
        ends = np.cumsum(self.counts)
        start = before = 0
        while start < len(ends):
            stop = max(start + 1, int(np.searchsorted(ends, before + rows, "right")))
            yield np.arange(start, stop)
            start, before = stop, int(ends[stop - 1])
