"""Versioned Parquet tables: written in one step, checked when read, resumable in shards."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from draftsmith.artifacts.atomic import TMP_PREFIX, atomic_path
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.schemas import TableSchema

log = logging.getLogger(__name__)

# How every table is written; its pages carry checksums, which every reader here verifies.
WRITTEN: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}

Rows: TypeAlias = Sequence[Mapping[str, Any]] | pa.Table


def write_table(path: Path, schema: TableSchema, rows: Rows) -> None:
    """Write `rows` to `path`; the file appears whole or not at all."""
    table = to_table(schema, rows)
    with atomic_path(path) as tmp:
        pq.write_table(table, tmp, **WRITTEN)


def read_table(path: Path, schema: TableSchema, columns: list[str] | None = None) -> pa.Table:
    """Read a table, or some of its columns, if it is whole and of exactly this schema and version.

    The checksums of what is read are verified; a table with a flipped bit is as damaged as a truncated one.
    """
    if path.is_dir():
        raise DraftsmithError(f"{path}: a folder, expected one Parquet file of {schema.name}")
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            _check_schema(path, schema, file.schema_arrow)
            return file.read(columns)
    except FileNotFoundError:
        raise _DamagedError(f"{path}: no such file; run the stage that writes {schema.name} again") from None
    except PermissionError as error:
        raise DraftsmithError(f"{path}: permission denied; make it readable") from error
    except (pa.ArrowException, OSError, EOFError) as error:
        raise _DamagedError(
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


def places(table: pa.Table, column: str, values: Sequence[str]) -> np.ndarray:
    """[rows] int64: where each row's `column` stands among `values`, -1 if it does not."""
    found = pc.index_in(table[column], value_set=pa.array(values, pa.string()))
    return pc.fill_null(found, -1).to_numpy().astype(np.int64)


def ordered(table: pa.Table, column: str, values: Sequence[str]) -> pa.Table:
    """The rows whose `column` is one of `values`, in their order; rows that share one keep theirs."""
    place = places(table, column, values)
    order = np.argsort(place, kind="stable")
    return table.take(order[place[order] >= 0])


def padded(table: pa.Table, column: str, width: int, fill: float, dtype: type) -> np.ndarray:
    """[rows, width]: a column of lists of up to `width` numbers, without a Python object for each; nulls are empty."""
    lengths = pc.fill_null(pc.list_value_length(table[column]), 0).to_numpy()
    matrix = np.full((table.num_rows, width), fill, dtype=dtype)
    matrix[np.arange(width) < lengths[:, None]] = pc.list_flatten(table[column]).to_numpy()
    return matrix


class ShardWriter:
    """Appends rows to a folder as `shard-00000.parquet`, `shard-00001.parquet`, …, each complete on disk.

    On a folder of an interrupted run it goes on behind the last whole shard; a truncated last one is set aside.
    """

    def __init__(self, folder: Path, schema: TableSchema) -> None:
        self.folder = folder
        self.schema = schema
        set_aside_truncated(folder, schema)
        existing = shard_paths(folder)
        self._next = int(existing[-1].stem.removeprefix("shard-")) + 1 if existing else 0

    def append(self, rows: Rows) -> Path | None:
        """Write one shard; nothing for no rows."""
        if len(rows) == 0:
            return None
        path = self.folder / f"shard-{self._next:05d}.parquet"
        write_table(path, self.schema, rows)
        self._next += 1
        return path


def read_shards(folder: Path, schema: TableSchema, columns: list[str] | None = None) -> pa.Table:
    """All shards of a folder in order as one table; an absent or empty folder is an empty table."""
    tables = [read_table(path, schema, columns) for path in shard_paths(folder)]
    if not tables:
        empty = schema.with_metadata.empty_table()
        return empty if columns is None else empty.select(columns)
    return pa.concat_tables(tables)


def set_aside_truncated(folder: Path, schema: TableSchema) -> None:
    """Hide a truncated last shard of an interrupted run, with a log line; its rows are to be made again."""
    shards = shard_paths(folder)
    if not shards:
        return
    try:
        read_table(shards[-1], schema)
    except _DamagedError:
        aside = shards[-1].with_name(f"{TMP_PREFIX}truncated-{shards[-1].name}")
        shards[-1].replace(aside)
        log.warning("%s was cut short by an interruption: set aside, its rows are made again", shards[-1])


def shard_paths(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*.parquet"))


class _DamagedError(DraftsmithError):
    """There is no such file, or it is not a whole Parquet file, as opposed to one of another schema."""


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
