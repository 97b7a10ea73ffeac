"""Readers for tables larger than memory: rows by range, by row group, or by the key that they belong to."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from draftsmith.artifacts.atomic import atomic_path
from draftsmith.artifacts.tables.parquet import open_table, table_errors
from draftsmith.artifacts.tables.schemas import TableSchema

_OPEN_FILES = 16
_MAPPED = 1024  # row groups of a copy, each some kB of pointers into it


class RowReader:
    """Reads the rows of one table, or of its shards, which are numbered consecutively.

    A call decodes the row groups that it touches, unless they are among the `keep` most recently used ones. Memory does
    not depend on the number of rows, except for an index of the row groups.
    """

    def __init__(self, paths: Path | Sequence[Path], schema: TableSchema, *, keep: int = 4) -> None:
        """Index the row groups. Raises DraftsmithError for a damaged file or another schema, as reading does."""
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
        # the first row of each row group, and the total number of rows
        self._starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self._open: OrderedDict[int, pq.ParquetFile] = OrderedDict()
        self._decoded: OrderedDict[tuple[int, tuple[str, ...]], pa.Table] = OrderedDict()

    @property
    def num_rows(self) -> int:
        return int(self._starts[-1])

    def file_index(self, rows: np.ndarray) -> np.ndarray:
        """Return the index of the path that holds each of these rows, shape [n]."""
        group = np.searchsorted(self._starts, rows, "right") - 1
        files: np.ndarray = np.append(self._files, -1)[np.minimum(group, len(self._files))]
        return files

    def rows(self, start: int, stop: int, columns: Sequence[str]) -> pa.Table:
        """Return rows `start` to `stop - 1`."""
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        slices = []
        for index in range(first, len(self._groups)):
            begin, end = int(self._starts[index]), int(self._starts[index + 1])
            if begin >= stop:
                break
            group = self._group(index, tuple(columns))
            slices.append(group.slice(max(start - begin, 0), min(stop, end) - max(start, begin)))
        if not slices:
            return self._schema.with_metadata.empty_table().select(list(columns))
        return pa.concat_tables(slices)

    def row_groups(self, columns: Sequence[str]) -> Iterator[pa.Table]:
        """Yield all rows in order, one row group at a time."""
        for index in range(len(self._groups)):
            yield self._read(index, columns)

    def write_copy(self, path: Path, columns: Sequence[str]) -> None:
        """Write some columns to a file without compression, for `MappedReader`."""
        fields = pa.schema([self._schema.columns.field(name) for name in columns])
        with atomic_path(path, durable=False) as tmp, pa.ipc.new_file(str(tmp), fields) as copy:
            for group in self.row_groups(columns):
                copy.write_table(group.combine_chunks().cast(fields))

    def _group(self, index: int, columns: tuple[str, ...]) -> pa.Table:
        key = (index, columns)
        if key not in self._decoded:
            self._decoded[key] = self._read(index, columns)
            while len(self._decoded) > self._keep:
                self._decoded.popitem(last=False)
        self._decoded.move_to_end(key)
        return self._decoded[key]

    def _read(self, index: int, columns: Sequence[str]) -> pa.Table:
        file = int(self._files[index])
        with table_errors(self._paths[file]):
            if file not in self._open:
                self._open[file] = open_table(self._paths[file], self._schema)
                while len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)[1].close()
            self._open.move_to_end(file)
            return self._open[file].read_row_group(int(self._groups[index]), list(columns), use_threads=False)


class MappedReader(RowReader):
    """Reads some columns from a copy that is mapped into memory (`RowReader.write_copy`), so that nothing is decoded.

    The copy is an Arrow file with one record batch per row group. Other columns are read from the table itself.
    """

    def __init__(self, paths: Path | Sequence[Path], schema: TableSchema, copy: Path) -> None:
        super().__init__(paths, schema, keep=_MAPPED)
        self._copy = pa.ipc.open_file(pa.memory_map(str(copy)))

    def _read(self, index: int, columns: Sequence[str]) -> pa.Table:
        if set(columns) <= set(self._copy.schema.names):
            return pa.Table.from_batches([self._copy.get_batch(index)]).select(list(columns))
        return super()._read(index, columns)


BATCH_ROWS = 1 << 15
_KEY = "trajectory_id"  # column of the keys


class KeyedRows:
    """Reads the rows of N keys. A key's rows are contiguous; if attempts wrote a key several times, the last counts.

    Holds 16 bytes per key in memory. The rows of a key begin where the column `counter` is 0; without a counter a key
    has one row.
    """

    def __init__(self, reader: RowReader, keys: pa.Array, counter: str | None = "step"):
        """Index the rows. keys: [N] strings, each a `trajectory_id`; rows of other keys are ignored."""
        self._reader = reader
        begins, names = [np.zeros(0, dtype=np.int64)], [pa.array([], pa.string())]
        row = 0
        for group in reader.row_groups([_KEY] if counter is None else [_KEY, counter]):
            first = np.arange(group.num_rows) if counter is None else np.flatnonzero(group[counter].to_numpy() == 0)
            begins.append(row + first)
            names += group[_KEY].take(pa.array(first)).chunks
            row += group.num_rows
        starts = np.concatenate(begins)
        stops = np.append(starts[1:], row)
        index = pc.fill_null(pc.index_in(pa.chunked_array(names), value_set=keys), -1).to_numpy()
        known = index >= 0
        self.starts, self.stops = np.zeros((2, len(keys)), dtype=np.int64)
        # for a key that occurs twice the last assignment counts
        self.starts[index[known]], self.stops[index[known]] = starts[known], stops[known]

    def exclude(self, keys: np.ndarray) -> None:
        """Drop the rows of some keys. keys: [N] bool."""
        self.starts[keys] = self.stops[keys] = 0

    @property
    def counts(self) -> np.ndarray:
        """Return the number of rows of each key, shape [N]."""
        counts: np.ndarray = self.stops - self.starts
        return counts

    def key_index(self, rows: np.ndarray) -> np.ndarray:
        """Return the index of the key that each of these rows belongs to, shape [n]; -1 for none."""
        order = np.argsort(self.starts, kind="stable")
        order = order[self.counts[order] > 0]
        if not len(order):
            return np.full(len(rows), -1, dtype=np.int64)
        key = order[np.maximum(np.searchsorted(self.starts[order], rows, "right") - 1, 0)]
        return np.where((rows >= self.starts[key]) & (rows < self.stops[key]), key, -1)

    def take(self, indices: Sequence[int] | np.ndarray, columns: Sequence[str]) -> pa.Table:
        """Return the rows of the keys at these indices, in that order."""
        rows = [self._reader.rows(int(self.starts[i]), int(self.stops[i]), columns) for i in indices]
        return pa.concat_tables(rows) if rows else self._reader.rows(0, 0, columns)

    def batches(self, columns: Sequence[str], rows: int = BATCH_ROWS) -> Iterator[pa.Table]:
        """Yield the rows of all keys in order, in batches of whole keys with about `rows` rows."""
        for indices in self.batch_indices(rows):
            yield self.take(indices, columns)

    def batch_indices(self, rows: int = BATCH_ROWS) -> Iterator[np.ndarray]:
        """Yield the indices of consecutive keys that have about `rows` rows together (at least one key)."""
        ends = np.cumsum(self.counts)
        start = before = 0
        while start < len(ends):
            stop = max(start + 1, int(np.searchsorted(ends, before + rows, "right")))
            yield np.arange(start, stop)
            start, before = stop, int(ends[stop - 1])
