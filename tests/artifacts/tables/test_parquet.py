"""Versioned Parquet tables, whole and in shards, are read back as written; errors name the file and the cause."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from draftsmith.artifacts.atomic import TMP_PREFIX
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables import schemas
from draftsmith.artifacts.tables.parquet import (
    TableShards,
    index_in,
    pad_lists,
    read_table,
    select_in_order,
    to_table,
    write_table,
)
from draftsmith.artifacts.tables.schemas import EVALUATED, PROMPTS, TRACE, TableSchema


def trace_row(step: Any = 0, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"trajectory_id": "p/0", "step": step, "anchor": 7, "accepted": 2, "proposed_ids": [5, 6, 7]}
    return row | {"target_logprobs": None} | changes


def test_rows_are_read_back_with_their_types_and_written_again_as_the_same_bytes(tmp_path: Path) -> None:
    row = trace_row(3, target_logprobs=[-0.5, -2.0, float("nan")])
    write_table(tmp_path / "a.parquet", TRACE, [row])
    table = read_table(tmp_path / "a.parquet", TRACE)
    (back,) = table.to_pylist()
    assert back["target_logprobs"][:2] == [-0.5, -2.0] and np.isnan(back["target_logprobs"][2])
    assert {**back, "target_logprobs": None} == trace_row(3)
    assert table.schema.field("proposed_ids").type == pa.list_(pa.int32())
    assert pq.read_metadata(tmp_path / "a.parquet").row_group(0).column(0).compression == "ZSTD"
    assert read_table(tmp_path / "a.parquet", TRACE, ["step"]).to_pydict() == {"step": [3]}
    write_table(tmp_path / "b.parquet", TRACE, table)
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_every_schema_writes_and_reads_an_empty_table(tmp_path: Path) -> None:
    tables = [value for value in vars(schemas).values() if isinstance(value, TableSchema)]
    assert len({table.name for table in tables}) == len(tables) >= 6
    for table in tables:
        write_table(tmp_path / f"{table.name}.parquet", table, [])
        assert read_table(tmp_path / f"{table.name}.parquet", table).num_rows == 0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (trace_row(step="x"), "trace: column step should be int32"),
        (trace_row(anchor=2**31), "trace: column anchor should be int32"),
        (trace_row(anchor=None), "trace: column anchor holds nulls"),
        (trace_row(extra=1), r"trace, row 0: missing columns \[\], unknown columns \['extra'\]"),
        ({"step": 1}, r"trace, row 0: missing columns \['accepted'"),
    ],
)
def test_the_error_for_a_bad_row_names_its_column(row: dict[str, Any], message: str) -> None:
    with pytest.raises(DraftsmithError, match=message):
        to_table(TRACE, [row])


def write_half(path: Path) -> None:
    write_table(path, TRACE, [trace_row(step) for step in range(1000)])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


LATER = TableSchema("trace", TRACE.version + 1, TRACE.columns)
WIDER = TableSchema(
    "trace", TRACE.version, TRACE.columns.set(TRACE.columns.get_field_index("anchor"), pa.field("anchor", pa.int64()))
)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_half, "not a complete Parquet file .*--force"),
        (Path.touch, "not a complete Parquet file .*--force"),
        (lambda path: path.write_text("prompt_id,split\n"), "not a complete Parquet file"),
        (Path.mkdir, "is a folder"),
        (lambda path: pq.write_table(pa.table({"step": [1]}), path), "was not written by Draftsmith"),
        (lambda path: write_table(path, PROMPTS, []), "is a table of prompts, but trace is expected"),
        (
            lambda path: write_table(path, LATER, [trace_row()]),
            f"trace has version {LATER.version}, but this Draftsmith reads version {TRACE.version}",
        ),
        (lambda path: write_table(path, WIDER, [trace_row()]), "column anchor is missing or not int32"),
    ],
)
def test_the_error_for_another_file_says_what_it_is(
    write: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    write(tmp_path / "t.parquet")
    with pytest.raises(DraftsmithError, match=rf"t\.parquet.*{message}"):
        read_table(tmp_path / "t.parquet", TRACE)


def test_a_flipped_bit_in_a_table_is_detected_or_harmless(tmp_path: Path) -> None:
    """Page checksums cover the values; bits elsewhere in the file are metadata that may not matter."""
    path = tmp_path / "t.parquet"
    rows = [trace_row(step) | {"proposed_ids": [step, 2 * step, 7]} for step in range(200)]
    write_table(path, TRACE, rows)
    original, written, random = path.read_bytes(), read_table(path, TRACE), Random(0)
    detected = 0
    for _ in range(300):
        content = bytearray(original)
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
        path.write_bytes(content)
        try:
            assert read_table(path, TRACE).equals(written)
        except DraftsmithError:
            detected += 1
    assert detected > 100


def test_rows_are_selected_in_the_order_of_values_and_the_sort_is_stable() -> None:
    rows = [trace_row(step, trajectory_id=name) for step in range(3) for name in "bac"]
    table = pa.concat_tables([to_table(TRACE, rows[:4]), to_table(TRACE, rows[4:])])  # shards are chunks
    assert index_in(table, "trajectory_id", ["c", "b"]).tolist() == [1, -1, 0] * 3
    selected = select_in_order(table, "trajectory_id", ["c", "b", "absent"])
    assert selected["trajectory_id"].to_pylist() == ["c"] * 3 + ["b"] * 3
    assert selected["step"].to_pylist() == [0, 1, 2] * 2
    assert select_in_order(TRACE.with_metadata.empty_table(), "trajectory_id", ["a"]).num_rows == 0


def test_lists_are_padded_like_single_rows() -> None:
    lists: list[list[float] | None] = [[-1.0, -2.0], None, [], [-3.0, -4.0, -5.0]]
    rows = [trace_row(target_logprobs=each) for each in lists]
    table = pa.concat_tables([to_table(TRACE, rows[:1]), to_table(TRACE, rows[1:])])
    expected = [[*(each or []), *[7.0] * (4 - len(each or []))] for each in lists]
    assert pad_lists(table, "target_logprobs", 4, 7.0, np.float32).tolist() == expected
    assert pad_lists(table.slice(2), "target_logprobs", 4, 7.0, np.float32).tolist() == expected[2:]
    assert pad_lists(table.slice(3), "target_logprobs", 3, 7.0, np.float32).tolist() == [lists[3]]
    assert pad_lists(table.slice(2, 1), "target_logprobs", 0, 7.0, np.float32).shape == (1, 0)
    with pytest.raises(ValueError):
        pad_lists(table, "target_logprobs", 2, 7.0, np.float32)


SCHEMAS = {"evaluated": EVALUATED, "trace": TRACE}


def rows(step: int) -> dict[str, list[dict[str, object]]]:
    return {
        "evaluated": [{"trajectory_id": "p/0", "evaluated_blocks": step, "outside_nucleus": 0}],
        "trace": [trace_row(step)],
    }


def steps(shards: TableShards) -> list[int]:
    return [step for table in shards.tables("trace", ["step"]) for step in table["step"].to_pylist()]


def test_shards_are_read_in_order_and_the_next_attempt_appends_to_them(tmp_path: Path) -> None:
    shards = TableShards(tmp_path, SCHEMAS)
    assert steps(shards) == []
    for step in (0, 1):
        shards.append(rows(step))
    again = TableShards(tmp_path, SCHEMAS)
    again.append(rows(2))
    assert steps(again) == steps(TableShards(tmp_path, SCHEMAS)) == [0, 1, 2]
    assert [path.name for path in again.paths("trace")] == [f"shard-0000{number}.parquet" for number in range(3)]


def test_a_shard_without_its_last_table_is_overwritten(tmp_path: Path) -> None:
    shards = TableShards(tmp_path, SCHEMAS)
    shards.append(rows(0))
    with pytest.raises(DraftsmithError):
        shards.append({**rows(1), "trace": [trace_row(step="x")]})
    again = TableShards(tmp_path, SCHEMAS)
    assert steps(again) == [0]
    again.append(rows(2))
    assert [t["evaluated_blocks"].to_pylist() for t in again.tables("evaluated")] == [[0], [2]]


@pytest.mark.parametrize("table", SCHEMAS)
@pytest.mark.parametrize("number", [1, 2])
def test_a_damaged_shard_is_renamed_and_made_again(
    number: int, table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = TableShards(tmp_path, SCHEMAS)
    for step in range(3):
        shards.append(rows(step))
    shard = shards.paths(table)[number]
    content = shard.read_bytes()
    shard.write_bytes(content[: len(content) // 2])
    assert steps(TableShards(tmp_path, SCHEMAS)) == [step for step in range(3) if step != number]
    assert str(shard) in caplog.text
    for name in SCHEMAS:  # with the prefix of temporary files, which never become part of an artifact
        assert (tmp_path / name / f"{TMP_PREFIX}damaged-{shard.name}").exists()
