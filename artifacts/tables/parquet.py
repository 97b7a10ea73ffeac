"""Versioned Parquet tables: written atomically, whole or shard by shard, and checked when they are read."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from draftsmith.artifacts.atomic import TMP_PREFIX, atomic_path
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.schemas import TableSchema

# Options of every table. Its pages have checksums, which every reader here verifies.
WRITE_OPTIONS: dict[str, object] = {"compression": "zstd", "write_page_checksum": True}

Rows: TypeAlias = Sequence[Mapping[str, object]] | pa.Table

GROUP_BYTES = 4 << 20  # approximate size of a row group before compression: a reader decodes that much for one row


def write_table(path: Path, schema: TableSchema, rows: Rows, group_bytes: int = GROUP_BYTES) -> None:
    """Write `rows` to `path` atomically."""
    with TableWriter(path, schema, group_bytes) as table:
        table.append(rows)


class TableWriter:
    """Writes a table in several calls, with one row group in memory.

    The file appears when the `with` body ends without an error. Row groups hold about `group_bytes`; their boundaries
    depend only on the rows, not on how they were appended.
    """

    def __init__(self, path: Path, schema: TableSchema, group_bytes: int = GROUP_BYTES) -> None:
        self.path, self.schema, self._group_bytes = path, schema, group_bytes
        self._pending: list[pa.Table] = []
        self._pending_bytes = 0
        self.rows = 0

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            tmp = opened.enter_context(atomic_path(self.path))
            options = WRITE_OPTIONS | {"use_dictionary": _dictionary_columns(self.schema.columns)}
            self._file = opened.enter_context(pq.ParquetWriter(tmp, self.schema.with_metadata, **options))
            self._opened = opened.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            with self._opened:
                self._flush()
        else:
            self._opened.__exit__(kind, error, trace)

    def append(self, rows: Rows) -> None:
        """Append rows. Raises DraftsmithError as `to_table` does."""
        table = to_table(self.schema, rows)
        self.rows += table.num_rows
        ends = np.cumsum(_row_bytes(table))
        start = before = 0
        while start < table.num_rows:
            last = int(np.searchsorted(ends, before + self._group_bytes - self._pending_bytes))
            stop = min(last + 1, table.num_rows)
            self._pending.append(table.slice(start, stop - start))
            self._pending_bytes += int(ends[stop - 1]) - before
            start, before = stop, int(ends[stop - 1])
            if self._pending_bytes >= self._group_bytes:
                self._flush()

    def _flush(self) -> None:
        if self._pending:
            group = pa.concat_tables(self._pending).combine_chunks()
            self._file.write_table(group, row_group_size=max(1, group.num_rows))
        self._pending, self._pending_bytes = [], 0


def _dictionary_columns(columns: pa.Schema) -> list[str]:
    """Return Parquet's names of the columns to write with a dictionary: all but floats.

    A dictionary of floats takes longer to build than the rest of a table, and more space than it saves.
    """

    def leaves(name: str, kind: pa.DataType) -> Iterator[str]:
        if pa.types.is_list(kind):
            yield from leaves(f"{name}.list.element", kind.value_type)
        elif pa.types.is_struct(kind):
            for field in kind:
                yield from leaves(f"{name}.{field.name}", field.type)
        elif not pa.types.is_floating(kind):
            yield name

    return [leaf for field in columns for leaf in leaves(field.name, field.type)]


def _row_bytes(table: pa.Table) -> np.ndarray:
    """Return the approximate bytes of each row, shape [rows]: 4 per list element, 8 per other column."""
    sizes = np.zeros(table.num_rows, dtype=np.int64)
    for column in table.columns:
        if pa.types.is_list(column.type):
            sizes += 4 * pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        else:
            sizes += 8
    return sizes


def read_table(path: Path, schema: TableSchema, columns: list[str] | None = None) -> pa.Table:
    """Read a table, or some of its columns, and verify schema, version and checksums. Raises DraftsmithError."""
    with table_errors(path), open_table(path, schema) as file:
        return file.read(columns)


def has_current_version(path: Path, schema: TableSchema) -> bool:
    """Return whether a table has the version of this schema. Raises DraftsmithError for a damaged file."""
    with table_errors(path, schema.name):
        metadata = pq.read_schema(path).metadata or {}
    return metadata.get(b"draftsmith.version") == str(schema.version).encode()


def open_table(path: Path, schema: TableSchema) -> pq.ParquetFile:
    """Open a table of exactly this schema and version. Raises DraftsmithError; wrap reads in `table_errors`."""
    if path.is_dir():
        raise DraftsmithError(f"{path}: is a folder. Name one Parquet file of {schema.name}.")
    with table_errors(path, schema.name):
        file = pq.ParquetFile(path, page_checksum_verification=True)
        _check_schema(path, schema, file.schema_arrow)
        return file


@contextmanager
def table_errors(path: Path, table: str = "it") -> Iterator[None]:
    """Turn errors of reading a Parquet file into one clear DraftsmithError. table: its name, if the file is missing."""
    try:
        yield
    except FileNotFoundError:
        raise DraftsmithError(f"{path}: no such file. Run the stage that writes {table} again.") from None
    except PermissionError as error:
        raise DraftsmithError(f"{path}: permission denied. Make it readable.") from error
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:  # the last one for a column's name
        raise DraftsmithError(
            f"{path}: not a complete Parquet file (truncated, damaged or of another format). Restore it, or make it "
            "again: add `--force` and the name of its stage to the command."
        ) from error


def to_table(schema: TableSchema, rows: Rows) -> pa.Table:
    """Convert rows to a table of this schema. Raises DraftsmithError for a missing, unknown or badly typed column."""
    names = schema.columns.names
    columns_of_rows = [set(rows.column_names)] if isinstance(rows, pa.Table) else [set(row) for row in rows]
    for index, columns in enumerate(columns_of_rows):
        if columns != set(names):
            missing, unknown = sorted(set(names) - columns), sorted(columns - set(names))
            raise DraftsmithError(f"{schema.name}, row {index}: missing columns {missing}, unknown columns {unknown}")
    try:
        if isinstance(rows, pa.Table):
            table = rows.select(names).replace_schema_metadata(None).cast(schema.columns)
        else:
            # One column at a time, since Arrow's own message does not name the column.
            table = pa.table([_column(field, rows) for field in schema.columns], schema=schema.columns)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DraftsmithError(f"{schema.name}: {error}") from error
    for field in schema.columns:
        if not field.nullable and table.column(field.name).null_count:
            raise DraftsmithError(f"{schema.name}: column {field.name} holds nulls")
    return table.replace_schema_metadata(schema.with_metadata.metadata)


def _column(field: pa.Field, rows: Sequence[Mapping[str, object]]) -> pa.Array:
    try:
        return pa.array([row[field.name] for row in rows], field.type)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(f"column {field.name} should be {field.type}: {error}") from error


def index_in(table: pa.Table, column: str, values: Sequence[str] | pa.Array) -> np.ndarray:
    """Return the index of each row's `column` in `values`, int64 of shape [rows]; -1 if it is not among them."""
    value_set = values if isinstance(values, pa.Array) else pa.array(values, pa.string())
    indices = pc.index_in(table[column], value_set=value_set)
    return pc.fill_null(indices, -1).to_numpy().astype(np.int64)


def select_in_order(table: pa.Table, column: str, values: Sequence[str] | pa.Array) -> pa.Table:
    """Return the rows whose `column` is among `values`, in the order of `values`; the sort is stable."""
    indices = index_in(table, column, values)
    order = np.argsort(indices, kind="stable")
    return table.take(order[indices[order] >= 0])


def pad_lists(table: pa.Table, column: str, width: int, fill: float, dtype: type) -> np.ndarray:
    """Return a column of lists of up to `width` numbers as a matrix [rows, width]; a null is an empty list."""
    lengths = pc.list_value_length(table[column]).to_numpy()  # NaN for a null
    values = pc.list_flatten(table[column]).to_numpy()
    if (lengths == width).all():  # the usual case, without a mask
        return values.reshape(table.num_rows, width).astype(dtype)
    matrix = np.full((table.num_rows, width), fill, dtype=dtype)
    matrix[np.arange(width) < lengths[:, None]] = values
    return matrix


def _check_schema(path: Path, schema: TableSchema, actual: pa.Schema) -> None:
    metadata = actual.metadata or {}
    name = metadata.get(b"draftsmith.table", b"").decode()
    if name != schema.name:
        what = f"is a table of {name}" if name else "was not written by Draftsmith"
        raise DraftsmithError(f"{path}: {what}, but {schema.name} is expected. Name the right artifact in the config.")
    version = metadata.get(b"draftsmith.version", b"?").decode()
    if version != str(schema.version):
        raise DraftsmithError(
            f"{path}: {name} has version {version}, but this Draftsmith reads version {schema.version}. "
            "Run the stage that wrote it again."
        )
    for field in schema.columns:
        if field.name not in actual.names or actual.field(field.name).type != field.type:
            raise DraftsmithError(f"{path}: column {field.name} is missing or not {field.type}. Run its stage again.")


log = logging.getLogger(__name__)


class TableShards:
    """Tables in numbered shards, `FOLDER/TABLE/shard-00000.parquet`; a number stands for one shard of each table.

    The shard of the last table is written last and completes the number; an incomplete number is overwritten. If a
    shard is damaged, all shards of its number are renamed, with a log line, and their rows are made again.
    """

    def __init__(
        self,
        folder: Path,
        schemas: Mapping[str, TableSchema],
        group_bytes: int = GROUP_BYTES,
        checked: Mapping[str, list[str]] | None = None,
    ) -> None:
        """Find the complete shards in a folder.

        schemas: table -> schema, in the order in which tables are written.
        checked: table -> columns that are read to find damage; None: all. `drop_damaged` reads the others.
        """
        self.folder, self.schemas, self._group_bytes = folder, dict(schemas), group_bytes
        last = [int(path.stem.removeprefix("shard-")) for path in shard_paths(folder / list(schemas)[-1])]
        self.numbers = [number for number in last if self._is_intact(number, checked)]
        self._next = last[-1] + 1 if last else 0

    def drop_damaged(self) -> bool:
        """Read all shards, and rename those of damaged numbers. Return whether there were any."""
        before = len(self.numbers)
        self.numbers = [number for number in self.numbers if self._is_intact(number)]
        return len(self.numbers) < before

    def append(self, rows: Mapping[str, Rows]) -> None:
        """Write the next shard of each table."""
        for name, schema in self.schemas.items():
            write_table(self._path(name, self._next), schema, rows[name], self._group_bytes)
        self.numbers.append(self._next)
        self._next += 1

    def paths(self, name: str) -> list[Path]:
        """Return the shards of a table, in order."""
        return [self._path(name, number) for number in self.numbers]

    def tables(self, name: str, columns: list[str] | None = None) -> list[pa.Table]:
        """Return the rows of a table, or some of its columns, shard by shard."""
        return [read_table(path, self.schemas[name], columns) for path in self.paths(name)]

    def _is_intact(self, number: int, columns: Mapping[str, list[str]] | None = None) -> bool:
        try:
            for name, schema in self.schemas.items():
                read_table(self._path(name, number), schema, None if columns is None else columns[name])
        except DraftsmithError as error:
            log.warning("rows of an earlier attempt are damaged and will be made again: %s", error)
            for name in self.schemas:
                if (path := self._path(name, number)).exists():
                    path.rename(path.with_name(f"{TMP_PREFIX}damaged-{path.name}"))
            return False
        return True

    def _path(self, name: str, number: int) -> Path:
        return self.folder / name / f"shard-{number:05d}.parquet"


class BufferedShards(TableShards):
    """Few large shards: added rows wait in memory. Use it in a `with` statement, whose end writes the rest."""

    LONGEST_WAIT_S: ClassVar[float] = 30.0  # a kill loses no more than the rows of this time

    def __init__(
        self, folder: Path, schemas: Mapping[str, TableSchema], group_bytes: int = GROUP_BYTES, *, most: int
    ) -> None:
        """Find the complete shards in a folder. most: total size of additions at which they are written."""
        super().__init__(folder, schemas, group_bytes)
        self._most, self._size, self._since = most, 0, 0.0
        self._waiting: list[Mapping[str, Rows]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()

    def add(self, rows: Mapping[str, Rows], size: int) -> None:
        """Add rows of each table, written after `most` or `LONGEST_WAIT_S` is reached.

        size: their size in the unit of `most`.
        """
        if not self._waiting:
            self._since = time.monotonic()
        self._waiting.append(rows)
        self._size += size
        if self._size >= self._most or time.monotonic() - self._since >= self.LONGEST_WAIT_S:
            self.flush()

    def flush(self) -> None:
        """Write everything that was added."""
        if self._waiting:
            self.append({name: _joined([rows[name] for rows in self._waiting]) for name in self.schemas})
        self._waiting, self._size = [], 0


def _joined(parts: list[Rows]) -> Rows:
    tables = [part for part in parts if isinstance(part, pa.Table)]
    return pa.concat_tables(tables) if tables else [row for part in parts for row in part]


def shard_paths(folder: Path) -> list[Path]:
    """Return the shards of one table, in order."""
    return sorted(folder.glob("shard-*.parquet"))
