"""Versioned Parquet tables, whole and in shards, are read back as written; errors name the file and the cause."""

from __future__ import annotations

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
from draftsmith.artifacts.tables.schemas import EVALUATED, PROMPTS, TRACE, VERIFY_STEPS, TableSchema


def trace_row(step: Any = 0, **changes: Any) -> dict[str, Any]:
    row: dict[str, Any] = {"trajectory_id": "p/0", "step": step, "anchor": 7, "accepted": 2, "proposed_ids": [5, 6, 7]}
    return row | {"target_logprobs": None} | changes


def test_rows_are_read_back_with_their_types(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "trajectory_id": "p/0",
        "step": 3,
        "anchor": 11,
        "accepted": 1,
        "committed": 2,
        "rejected_offset": 2,
        "judged": 2,
        "proposed_ids": [4, 5, 6],
        "target_logprobs": [-0.5, -2.0, float("nan")],
        "committed_id": 9,
        "best_logprob": -0.125,
    }
    write_table(tmp_path / "t.parquet", VERIFY_STEPS, [row])
    table = read_table(tmp_path / "t.parquet", VERIFY_STEPS)
    (back,) = table.to_pylist()
    assert np.isnan(back["target_logprobs"][2])
    assert {**back, "target_logprobs": None} == {**row, "target_logprobs": None}
    assert table.schema.field("proposed_ids").type == pa.list_(pa.int32())
    assert pq.read_metadata(tmp_path / "t.parquet").row_group(0).column(0).compression == "ZSTD"


def test_single_columns_are_read_and_a_read_table_is_written_back_unchanged(tmp_path: Path) -> None:
    write_table(tmp_path / "a.parquet", TRACE, [trace_row(0), trace_row(1)])
    assert read_table(tmp_path / "a.parquet", TRACE, ["step"]).to_pydict() == {"step": [0, 1]}
    write_table(tmp_path / "b.parquet", TRACE, read_table(tmp_path / "a.parquet", TRACE))
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()


def test_every_schema_writes_and_reads_an_empty_table(tmp_path: Path) -> None:
    tables = [value for value in vars(schemas).values() if isinstance(value, TableSchema)]
    assert len({table.name for table in tables}) == len(tables) - 1 >= 6  # trajectories have two forms
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


@pytest.mark.parametrize("share", [0, 0.5])
def test_the_error_for_a_truncated_file_names_it(tmp_path: Path, share: float) -> None:
    path = tmp_path / "t.parquet"
    write_table(path, TRACE, [trace_row(step) for step in range(1000)])
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DraftsmithError, match=r"t\.parquet: not a complete Parquet file .*--force"):
        read_table(path, TRACE)


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


def test_the_error_for_a_foreign_file_says_what_it_is(tmp_path: Path) -> None:
    pq.write_table(pa.table({"step": [1]}), tmp_path / "foreign.parquet")
    with pytest.raises(DraftsmithError, match=r"foreign\.parquet: was not written by Draftsmith"):
        read_table(tmp_path / "foreign.parquet", TRACE)
    write_table(tmp_path / "other.parquet", PROMPTS, [])
    with pytest.raises(DraftsmithError, match=r"other\.parquet: is a table of prompts, but trace is expected"):
        read_table(tmp_path / "other.parquet", TRACE)
    (tmp_path / "text.parquet").write_text("prompt_id,split\n")
    with pytest.raises(DraftsmithError, match=r"text\.parquet: not a complete Parquet file"):
        read_table(tmp_path / "text.parquet", TRACE)
    with pytest.raises(DraftsmithError, match="is a folder"):
        read_table(tmp_path, TRACE)


def test_the_error_for_another_version_names_both(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", TableSchema("trace", TRACE.version + 1, TRACE.columns), [trace_row()])
    message = f"trace has version {TRACE.version + 1}, but this Draftsmith reads version {TRACE.version}"
    with pytest.raises(DraftsmithError, match=message):
        read_table(tmp_path / "t.parquet", TRACE)


def test_a_column_of_another_type_is_refused(tmp_path: Path) -> None:
    columns = pa.schema(
        [field if field.name != "anchor" else pa.field("anchor", pa.int64()) for field in TRACE.columns]
    )
    write_table(tmp_path / "t.parquet", TableSchema("trace", TRACE.version, columns), [trace_row()])
    with pytest.raises(DraftsmithError, match="column anchor is missing or not int32"):
        read_table(tmp_path / "t.parquet", TRACE)


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    write_table(tmp_path / "t.parquet", TRACE, [trace_row(0)])
    with pytest.raises(DraftsmithError):
        write_table(tmp_path / "t.parquet", TRACE, [trace_row(step="x")])
    assert read_table(tmp_path / "t.parquet", TRACE)["step"].to_pylist() == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["t.parquet"]


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
