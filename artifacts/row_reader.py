"""Rows of tables larger than memory: by range, with a few decoded row groups in memory, or all in turn."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from draftsmith.artifacts.parquet import open_table, reading
from draftsmith.artifacts.schemas import TableSchema

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
            with reading(path), open_table(path, schema) as opened:
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

    def place_of(self, rows: np.ndarray) -> np.ndarray:
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
        with reading(self._paths[file]):
            if file not in self._open:
                self._open[file] = open_table(self._paths[file], self._schema)
                while len(self._open) > _OPEN_FILES:
                    self._open.popitem(last=False)[1].close()
            self._open.move_to_end(file)
            return self._open[file].read_row_group(int(self._groups[place]), list(columns), use_threads=False)
