"""Versioned Parquet tables: written in one step, checked when read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from draftsmith.artifacts.atomic import atomic_path
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.schemas import TableSchema

# How every table is written; its pages carry checksums, which every reader here verifies.
WRITE_OPTIONS: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}

Rows: TypeAlias = Sequence[Mapping[str, Any]] | pa.Table

GROUP_BYTES = 4 << 20  # of a row group before compression, about: what a reader of single rows decodes for one


def write_table(path: Path, schema: TableSchema, rows: Rows, group_bytes: int = GROUP_BYTES) -> None:
    """Write `rows` to `path`; the file appears whole or not at all."""
    with TableWriter(path, schema, group_bytes) as table:
        table.append(rows)


class TableWriter:
    """A table that is appended to, with one row group in memory; the file appears when the body ends without an error.

    Row groups hold about `group_bytes`. Where they end depends on the rows alone, not on how they were appended.
    """

    def __init__(self, path: Path, schema: TableSchema, group_bytes: int = GROUP_BYTES) -> None:
        self.path, self.schema, self._group_bytes = path, schema, group_bytes
        self._waiting: list[pa.Table] = []
        self._filled = 0  # bytes that wait
        self.rows = 0

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            tmp = opened.enter_context(atomic_path(self.path))
            written = WRITE_OPTIONS | {"use_dictionary": _dictionary_columns(self.schema.columns)}
            self._file = opened.enter_context(pq.ParquetWriter(tmp, self.schema.with_metadata, **written))
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
        """Raises DraftsmithError as `to_table` does."""
        table = to_table(self.schema, rows)
        self.rows += table.num_rows
        ends = np.cumsum(_row_bytes(table))
        start = before = 0
        while start < table.num_rows:
            place = int(np.searchsorted(ends, before + self._group_bytes - self._filled))
            stop = min(place + 1, table.num_rows)
            self._waiting.append(table.slice(start, stop - start))
            self._filled += int(ends[stop - 1]) - before
            start, before = stop, int(ends[stop - 1])
            if self._filled >= self._group_bytes:
                self._flush()

    def _flush(self) -> None:
        if self._waiting:
            group = pa.concat_tables(self._waiting).combine_chunks()
            self._file.write_table(group, row_group_size=max(1, group.num_rows))
        self._waiting, self._filled = [], 0


def _dictionary_columns(columns: pa.Schema) -> list[str]:
    """Parquet's names of the columns whose values come again. A dictionary of floats takes longer to make than all the
    rest of a table, and more room than it saves."""

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
    """[rows] about: four a list's element, eight a column that is no list."""
    sizes = np.zeros(table.num_rows, dtype=np.int64)
    for column in table.columns:
        if pa.types.is_list(column.type):
            sizes += 4 * pc.fill_null(pc.list_value_length(column), 0).to_numpy()
        else:
            sizes += 8
    return sizes


def read_table(path: Path, schema: TableSchema, columns: list[str] | None = None) -> pa.Table:
    """Read a table, or some of its columns, if it is whole and of exactly this schema and version.

    The checksums of what is read are verified; a table with a flipped bit is as damaged as a truncated one.
    """
    with table_errors(path), open_table(path, schema) as file:
        return file.read(columns)


def has_current_version(path: Path, schema: TableSchema) -> bool:
    """Whether a table is of this schema's very version. Raises DraftsmithError for a file that is damaged."""
    with table_errors(path, schema.name):
        metadata = pq.read_schema(path).metadata or {}
    return metadata.get(b"draftsmith.version") == str(schema.version).encode()


def open_table(path: Path, schema: TableSchema) -> pq.ParquetFile:
    """Open a table of exactly this schema and version. Raises DraftsmithError; wrap reads in `table_errors`."""
    if path.is_dir():
        raise DraftsmithError(f"{path}: a folder, expected one Parquet file of {schema.name}")
    with table_errors(path, schema.name):
        file = pq.ParquetFile(path, page_checksum_verification=True)
        _check_schema(path, schema, file.schema_arrow)
        return file


@contextmanager
def table_errors(path: Path, what: str = "it") -> Iterator[None]:
    """Turn what reading a Parquet file raises into one clear DraftsmithError. what: the table that is missing."""
    try:
        yield
    except FileNotFoundError:
        raise DraftsmithError(f"{path}: no such file; run the stage that writes {what} again") from None
    except PermissionError as error:
        raise DraftsmithError(f"{path}: permission denied; make it readable") from error
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:  # the last: of the name of a column
        raise DraftsmithError(
            f"{path}: not a whole Parquet file (truncated, damaged or of another format); restore it, or make it again "
            "by adding `--force` and the name of its stage to the command"
        ) from error


def to_table(schema: TableSchema, rows: Rows) -> pa.Table:
    """Rows as a table of this schema. A missing, unknown or badly typed column is an error that names it."""
    names = schema.columns.names
    found = [set(rows.column_names)] if isinstance(rows, pa.Table) else [set(row) for row in rows]
    for index, columns in enumerate(found):
        if columns != set(names):
            missing, unknown = sorted(set(names) - columns), sorted(columns - set(names))
            raise DraftsmithError(f"{schema.name}, row {index}: missing columns {missing}, unknown columns {unknown}")
    try:
        if isinstance(rows, pa.Table):
            table = rows.select(names).replace_schema_metadata(None).cast(schema.columns)
        else:
            # One column at a time: Arrow's own message does not say which one is wrong.
            table = pa.table([_column(field, rows) for field in schema.columns], schema=schema.columns)
    except (pa.ArrowException, ValueError, TypeError) as error:
        raise DraftsmithError(f"{schema.name}: {error}") from error
    for field in schema.columns:
        if not field.nullable and table.column(field.name).null_count:
            raise DraftsmithError(f"{schema.name}: column {field.name} holds nulls")
    return table.replace_schema_metadata(schema.with_metadata.metadata)


def _column(field: pa.Field, rows: Sequence[Mapping[str, Any]]) -> pa.Array:
    try:
        return pa.array([row[field.name] for row in rows], field.type)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(f"column {field.name} should be {field.type}: {error}") from error


def index_in(table: pa.Table, column: str, values: Sequence[str] | pa.Array) -> np.ndarray:
    """[rows] int64: where each row's `column` stands among `values`, -1 if it does not."""
    known = values if isinstance(values, pa.Array) else pa.array(values, pa.string())
    found = pc.index_in(table[column], value_set=known)
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)


def select_in_order(table: pa.Table, column: str, values: Sequence[str] | pa.Array) -> pa.Table:
    """The rows whose `column` is one of `values`, in their order; rows that share one keep theirs."""
    place = index_in(table, column, values)
    order = np.argsort(place, kind="stable")
    return table.take(order[place[order] >= 0])


def pad_lists(table: pa.Table, column: str, width: int, fill: float, dtype: type) -> np.ndarray:
    """[rows, width]: a column of lists of up to `width` numbers, without a Python object for each; nulls are empty."""
    lengths = pc.fill_null(pc.list_value_length(table[column]), 0).to_numpy()
    matrix = np.full((table.num_rows, width), fill, dtype=dtype)
    matrix[np.arange(width) < lengths[:, None]] = pc.list_flatten(table[column]).to_numpy()
    return matrix


def _check_schema(path: Path, schema: TableSchema, found: pa.Schema) -> None:
    metadata = found.metadata or {}
    name = metadata.get(b"draftsmith.table", b"").decode()
    if name != schema.name:
        what = f"a table of {name}" if name else "a Parquet file that Draftsmith did not write"
        raise DraftsmithError(f"{path}: {what}, expected {schema.name}; point the config at the right artifact")
    version = metadata.get(b"draftsmith.version", b"?").decode()
    if version != str(schema.version):
        raise DraftsmithError(
            f"{path}: {name} of version {version}, this Draftsmith reads version {schema.version}; "
            "run the stage that wrote it again"
        )
    for field in schema.columns:
        if field.name not in found.names or found.field(field.name).type != field.type:
            raise DraftsmithError(f"{path}: column {field.name} is absent or not {field.type}; run its stage again")
