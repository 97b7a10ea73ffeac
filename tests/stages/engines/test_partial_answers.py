"""Shards of an unfinished rollout: complete or absent, and an answer has the rows of one shard only."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from draftsmith.artifacts.tables.parquet import write_table
from draftsmith.artifacts.tables.schemas import TIMINGS
from draftsmith.stages.engines.base import Completion, Request, VerifyStep
from draftsmith.stages.engines.partial_answers import SCHEMAS, PartialAnswers

SPLITS = {"a": "train", "b": "train"}


def answer(name: str, response: list[int], accepted: list[int] | None = None) -> Completion:
    """Return an answer with recorded verify steps, or without."""
    steps = [VerifyStep(index, kept, [7, 8, 9]) for index, kept in enumerate(accepted or [])]
    request = Request(name, [1, 2], 8)
    return Completion(request, response, "length", steps, verify_steps=len(accepted or []))


def tables_of(parts: PartialAnswers, ids: list[str]) -> dict[str, pa.Table]:
    """Return complete tables, in the order of the answers."""
    rows = parts.rows(ids)
    return {name: rows[name].take(range(len(ids)), schema.columns.names) for name, schema in SCHEMAS.items()}


def contents(parts: PartialAnswers, ids: list[str]) -> list[tuple[str, list[int], list[int]]]:
    """Return (id, response, accepted of its trace) of every answer."""
    tables = tables_of(parts, ids)
    steps = tables["trace"].to_pylist()
    return [
        (
            row["trajectory_id"],
            row["response_ids"],
            [step["accepted"] for step in steps if step["trajectory_id"] == row["trajectory_id"]],
        )
        for row in tables["trajectories"].to_pylist()
    ]


def test_an_answer_generated_again_without_a_trace_loses_the_old_trace(tmp_path: Path) -> None:
    """Killed between the trace's shard and the answers', and the servers of the second attempt have no plug-in."""
    killed = PartialAnswers(tmp_path)
    killed.append([answer("a/0", [3, 4, 5], [2])], SPLITS, "first")
    killed.append([answer("b/0", [6, 7], [0, 0])], SPLITS, "first")
    (tmp_path / "trajectories" / "shard-00001.parquet").unlink()
    again = PartialAnswers(tmp_path)
    assert again.finished(with_trace=True) == {"a/0"}
    again.append([answer("b/0", [6, 8])], SPLITS, "second")
    assert contents(again, ["a/0", "b/0"]) == [("a/0", [3, 4, 5], [2]), ("b/0", [6, 8], [])]
    assert tables_of(again, ["a/0", "b/0"])["timings"].num_rows == 2


def test_an_answer_generated_again_for_its_trace_has_the_rows_of_its_last_shard(tmp_path: Path) -> None:
    parts = PartialAnswers(tmp_path)
    parts.append([answer("b/0", [6, 7]), answer("a/0", [3])], SPLITS, "first")  # counted, but not recorded
    write_table(tmp_path / "timings" / "shard-00000.parquet", TIMINGS, _with_steps(parts, 2))
    assert (parts.finished(with_trace=False), parts.finished(with_trace=True)) == ({"a/0", "b/0"}, set())
    parts.append([answer("a/0", [4, 5], [1])], SPLITS, "second")
    assert parts.finished(with_trace=True) == {"a/0"}
    assert contents(parts, ["a/0", "b/0"]) == [("a/0", [4, 5], [1]), ("b/0", [6, 7], [])]


def test_an_answer_that_a_recording_engine_gave_without_steps_is_not_generated_again(tmp_path: Path) -> None:
    parts = PartialAnswers(tmp_path)
    retracted = replace(answer("b/0", [6, 7]), verify_steps=2)
    parts.append([answer("a/0", [3, 4], [1]), retracted], SPLITS, "e")
    assert PartialAnswers(tmp_path).finished(with_trace=True) == {"a/0", "b/0"}


def damage_column(path: Path, column: str) -> None:
    """Flip a bit in the data of a column, so that whoever reads it finds its checksum wrong."""
    group = pq.ParquetFile(path).metadata.row_group(0)
    (chunk,) = (c for i in range(group.num_columns) if (c := group.column(i)).path_in_schema.split(".")[0] == column)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("table", "column"),
    [("trajectories", "prompt_ids"), ("trajectories", "response_ids"), ("trace", "proposed_ids"), ("trace", "anchor")],
)
def test_resuming_reads_no_tokens_and_no_steps(table: str, column: str, tmp_path: Path) -> None:
    parts = PartialAnswers(tmp_path)
    for name in ("a/0", "b/0"):
        parts.append([answer(name, list(range(3, 60)), [2] * 9)], SPLITS, "e")
    damage_column(tmp_path / table / "shard-00001.parquet", column)
    resumed = PartialAnswers(tmp_path)
    assert resumed.finished(with_trace=True) == {"a/0", "b/0"}
    assert resumed.drop_damaged() and not resumed.drop_damaged()
    assert resumed.finished(with_trace=True) == {"a/0"}


def _with_steps(parts: PartialAnswers, steps: int) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = tables_of(parts, ["a/0", "b/0"])["timings"].to_pylist()
    return [row | {"verify_steps": steps} for row in rows]
