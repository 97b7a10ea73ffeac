"""Tables of an unfinished attempt, written shard by shard so that the next attempt can continue."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from draftsmith.artifacts.atomic import TMP_PREFIX
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import GROUP_BYTES, Rows, read_table, write_table
from draftsmith.artifacts.tables.schemas import TableSchema

log = logging.getLogger(__name__)


class TableShards:
    """Tables in numbered shards, `FOLDER/TABLE/shard-00000.parquet`; a number stands for one shard of each table.

    The shard of the last table is written last and completes the number; an incomplete number is overwritten. If any
    shard is damaged, all of its number are renamed, with a log line, and their rows are made again.
    """

    def __init__(self, folder: Path, schemas: Mapping[str, TableSchema], group_bytes: int = GROUP_BYTES) -> None:
        """Find the complete shards in a folder. schemas: of the tables, in the order in which they are written."""
        self.folder, self.schemas, self._group_bytes = folder, dict(schemas), group_bytes
        last = [int(path.stem.removeprefix("shard-")) for path in shard_paths(folder / list(schemas)[-1])]
        self.numbers = [number for number in last if self._is_intact(number)]
        self._next = last[-1] + 1 if last else 0

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

    def _is_intact(self, number: int) -> bool:
        try:
            for name, schema in self.schemas.items():
                read_table(self._path(name, number), schema)
        except DraftsmithError as error:
            log.warning("rows of an earlier attempt are damaged and will be made again: %s", error)
            for name in self.schemas:
                if (path := self._path(name, number)).exists():
                    path.rename(path.with_name(f"{TMP_PREFIX}damaged-{path.name}"))
            return False
        return True

    def _path(self, name: str, number: int) -> Path:
        return self.folder / name / f"shard-{number:05d}.parquet"


def shard_paths(folder: Path) -> list[Path]:
    """Return the shards of one table, in order."""
    return sorted(folder.glob("shard-*.parquet"))
