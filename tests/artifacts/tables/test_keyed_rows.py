"""Rows are found by key in any order of shards; of several attempts at a key the last counts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from draftsmith.artifacts.tables.parquet import TableShards, select_in_order, shard_paths, to_table, write_table
from draftsmith.artifacts.tables.readers import KeyedRows, RowReader
from draftsmith.artifacts.tables.schemas import TIMINGS, TRACE
from tests.artifacts.tables.test_parquet import trace_row

COLUMNS = TRACE.columns.names
KEYS = [f"p{index}/0" for index in range(40)]


def steps(key: str, count: int, anchor: int = 0) -> pa.Table:
    return to_table(TRACE, [trace_row(s, trajectory_id=key, anchor=anchor + s, proposed_ids=[s]) for s in range(count)])


def shuffled(folder: Path) -> pa.Table:
    """Write 40 keys of 0 to 19 steps each in random order, and return all rows."""
    rng = np.random.default_rng(0)
    tables = [steps(KEYS[i], int(rng.integers(0, 20))) for i in rng.permutation(40)]
    shards = TableShards(folder, {"trace": TRACE}, group_bytes=500)
    for start in range(0, 40, 7):
        shards.append({"trace": pa.concat_tables(tables[start : start + 7])})
    return pa.concat_tables(tables)


def test_batches_have_the_order_of_the_keys(tmp_path: Path) -> None:
    """The batches equal the rows selected from the whole table."""
    whole = shuffled(tmp_path)
    rows = KeyedRows(RowReader(shard_paths(tmp_path / "trace"), TRACE, keep=2), pa.array(KEYS))
    assert rows.counts.tolist() == [whole["trajectory_id"].to_pylist().count(key) for key in KEYS]
    for size in (1, 30, 10**6):
        batches = list(rows.batches(COLUMNS, size))
        assert pa.concat_tables(batches).equals(select_in_order(whole, "trajectory_id", KEYS))
        assert all(batch.num_rows <= max(size, 19) for batch in batches)
    assert rows.take([7, 3], ["trajectory_id"])["trajectory_id"].unique().to_pylist() == ["p7/0", "p3/0"]


def test_key_index_maps_rows_to_their_keys(tmp_path: Path) -> None:
    shuffled(tmp_path)
    reader = RowReader(shard_paths(tmp_path / "trace"), TRACE)
    names = pa.concat_tables(reader.row_groups(["trajectory_id"]))["trajectory_id"].to_pylist()
    keys = KEYS[5:30]
    indices = KeyedRows(reader, pa.array(keys)).key_index(np.arange(reader.num_rows))
    expected = [name if name in keys else None for name in names]
    assert [keys[index] if index >= 0 else None for index in indices] == expected


def test_the_last_of_several_attempts_at_a_key_counts(tmp_path: Path) -> None:
    shards = TableShards(tmp_path, {"trace": TRACE})
    for table in (steps("a", 3), steps("b", 2), steps("a", 2, anchor=50)):
        shards.append({"trace": table})
    rows = KeyedRows(RowReader(shard_paths(tmp_path / "trace"), TRACE), pa.array(["a", "b", "c"]))
    assert rows.counts.tolist() == [2, 2, 0]
    assert rows.take([0], ["anchor"])["anchor"].to_pylist() == [50, 51]


@pytest.mark.parametrize("keys", [["a", "b"], []])
def test_without_a_counter_every_row_stands_alone(tmp_path: Path, keys: list[str]) -> None:
    numbers = dict.fromkeys(TIMINGS.columns.names, 1.0)
    rows = [numbers | {"trajectory_id": key, "verify_steps": n} for n, key in enumerate(["b", "x", "a", "b"])]
    write_table(tmp_path / "t.parquet", TIMINGS, rows)
    keyed = KeyedRows(RowReader(tmp_path / "t.parquet", TIMINGS), pa.array(keys, pa.string()), counter=None)
    assert keyed.take(range(len(keys)), ["verify_steps"])["verify_steps"].to_pylist() == [2, 3][: len(keys)]
