"""Shards of an unfinished attempt are complete or ignored, and the next attempt appends to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from draftsmith.artifacts.atomic import TMP_PREFIX
from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.schemas import EVALUATED, TRACE
from draftsmith.artifacts.tables.shards import TableShards
from tests.artifacts.tables.test_parquet import trace_row

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
