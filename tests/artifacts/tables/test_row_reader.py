"""Rows read by range equal those of the whole table, wherever row groups and shards end."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import TableShards, TableWriter, read_table, to_table, write_table
from draftsmith.artifacts.tables.readers import MappedReader, RowReader
from draftsmith.artifacts.tables.schemas import TIMINGS, TRACE
from tests.artifacts.tables.test_parquet import trace_row

COLUMNS = TRACE.columns.names


def steps(count: int, seed: int = 0) -> pa.Table:
    """Return rows of TRACE with lists of 0 to 7 proposals, half of them without log-probs."""
    rng = np.random.default_rng(seed)
    proposed = [rng.integers(0, 99, rng.integers(0, 8)).astype(np.int32) for _ in range(count)]
    likely = [None if row % 2 else -ids.astype(np.float32) for row, ids in enumerate(proposed)]
    rows = [
        trace_row(row % 9, trajectory_id=f"p{row // 9}/0", anchor=row, proposed_ids=ids, target_logprobs=likely[row])
        for row, ids in enumerate(proposed)
    ]
    return to_table(TRACE, rows)


def test_row_groups_do_not_depend_on_how_rows_were_appended(tmp_path: Path) -> None:
    table, rng = steps(500), np.random.default_rng(1)
    write_table(tmp_path / "once.parquet", TRACE, table, group_bytes=2000)
    with TableWriter(tmp_path / "pieces.parquet", TRACE, group_bytes=2000) as writer:
        while writer.rows < table.num_rows:
            writer.append(table.slice(writer.rows, int(rng.integers(0, 40))))
    assert (tmp_path / "once.parquet").read_bytes() == (tmp_path / "pieces.parquet").read_bytes()
    assert pq.read_metadata(tmp_path / "once.parquet").num_row_groups > 10
    assert read_table(tmp_path / "pieces.parquet", TRACE).equals(table)


def test_an_unfinished_table_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), TableWriter(tmp_path / "t.parquet", TRACE) as table:
        table.append(steps(5))
        1 / 0  # noqa: B018
    assert list(tmp_path.iterdir()) == []


def test_rows_by_range_equal_those_of_the_table(tmp_path: Path) -> None:
    """Both from one file and from shards of different lengths."""
    table, rng = steps(400), np.random.default_rng(2)
    write_table(tmp_path / "t.parquet", TRACE, table, group_bytes=3000)
    shards, written = TableShards(tmp_path, {"shards": TRACE}, group_bytes=1000), 0
    while written < table.num_rows:
        count = int(rng.integers(1, 60))
        shards.append({"shards": table.slice(written, count)})
        written += count
    whole, in_shards = RowReader(tmp_path / "t.parquet", TRACE), RowReader(shards.paths("shards"), TRACE, keep=1)
    whole.write_copy(tmp_path / "whole.arrow", COLUMNS)
    in_shards.write_copy(tmp_path / "some.arrow", ["anchor", "proposed_ids", "target_logprobs"])
    for reader in (
        whole,
        in_shards,
        MappedReader(tmp_path / "t.parquet", TRACE, tmp_path / "whole.arrow"),
        MappedReader(shards.paths("shards"), TRACE, tmp_path / "some.arrow"),
    ):
        assert reader.num_rows == table.num_rows
        for start, stop in [(0, 400), (0, 0), (399, 400), *np.sort(rng.integers(0, 401, (50, 2)))]:
            assert reader.rows(start, stop, COLUMNS).equals(table.slice(start, stop - start))
        assert pa.concat_tables(reader.row_groups(COLUMNS)).equals(table)
        assert reader.rows(7, 9, ["anchor"]).to_pydict() == {"anchor": [7, 8]}


def test_a_mapped_copy_takes_no_memory_and_decodes_nothing(tmp_path: Path) -> None:
    path, copy, table = tmp_path / "t.parquet", tmp_path / "t.arrow", steps(4000)
    write_table(path, TRACE, table, group_bytes=10_000)
    RowReader(path, TRACE).write_copy(copy, COLUMNS)
    reader = MappedReader(path, TRACE, copy)
    path.unlink()
    before = pa.total_allocated_bytes()
    assert reader.rows(0, 4000, COLUMNS).equals(table)
    assert pa.total_allocated_bytes() - before < 1000


def test_errors_for_damage_and_other_tables_name_the_cause(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    with pytest.raises(DraftsmithError, match=r"t\.parquet: no such file. Run the stage that writes trace again"):
        RowReader(path, TRACE)
    write_table(path, TRACE, steps(100))
    with pytest.raises(DraftsmithError, match="is a table of trace, but timings is expected"):
        RowReader(path, TIMINGS)
    whole = path.read_bytes()
    reader = RowReader(path, TRACE)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DraftsmithError, match="not a complete Parquet file"):
        reader.rows(0, 1, COLUMNS)
