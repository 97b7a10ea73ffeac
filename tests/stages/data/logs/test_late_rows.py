"""Late rows and bad rows: which of them a time window reads and counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.time_window import parse_time
from tests.stages.data.logs.logs_run import Logs, Row, as_ids, counts, set_aside, table, write
from tests.testbed.context import RecordingContext

NOON = "2026-03-05T12:00:00Z"


def at(row: Row, minutes: float) -> Row:
    """Return the row logged this many minutes after noon."""
    noon = parse_time(NOON)
    assert noon is not None
    return as_ids(row) | {"created": int(noon.timestamp() + 60 * minutes)}


def responses(ctx: RecordingContext) -> list[list[int]]:
    return [row["response_ids"] for row in table(ctx)]


def following(logs: Logs, before: RecordingContext, *paths: Path, **config: Any) -> RecordingContext:
    """Run the refresh after one that promoted."""
    newest, inputs = counts(before)["window"]["newest"], {"earlier": logs.earlier(before)}
    return logs.run(*paths, inputs=inputs, since="last", after=newest, **config)


def test_late_rows_are_read_once(logs: Logs) -> None:
    """Rows up to an hour late: in the last second read, in a later file, with the time of a long request."""
    answers = logs.answers[:9]
    seen, (twin, late, request, too_late, new) = answers[:4], answers[4:]
    rows = [at(row, minutes) for row, minutes in zip(seen, (-90, -30, -1, 0), strict=True)]
    log = logs.write("a.jsonl", rows)
    first = logs.run(log, since="last")
    write(log, [*rows, at(twin, 0), at(new, 5)])
    other = logs.write("b.jsonl", [at(late, -10), at(request, -59), at(too_late, -61)])

    second = following(logs, first, log, other)
    assert responses(second) == [row["response_ids"] for row in (twin, new, late, request)]
    found = counts(second)
    assert found["set_aside"] == {"used by the champion's refresh": 3} and len(set_aside(second)) == 3
    assert (found["outside_window"], found["window"]["newest"]) == (2, "2026-03-05T12:05:00Z")
    longer = following(logs, first, log, other, lateness_hours=2)
    assert responses(longer)[-1] == too_late["response_ids"] and len(responses(longer)) == 5


def test_without_lateness_or_earlier_answers_a_window_begins_after_the_newest_row(logs: Logs) -> None:
    log = logs.write("a.jsonl", [at(logs.answers[n], minutes) for n, minutes in enumerate((-5, 0, 5))])
    first = logs.run(log, since="last")
    settings: Row = {"since": "last", "after": NOON}
    for inputs, hours in (({"earlier": logs.earlier(first)}, 0), ({}, 1)):
        ctx = logs.run(log, inputs=inputs, lateness_hours=hours, **settings)
        assert responses(ctx) == [logs.answers[2]["response_ids"]]
        assert counts(ctx)["outside_window"] == 2


def test_earlier_answers_of_an_older_table_version_are_neither_repeated_nor_replayed(logs: Logs) -> None:
    """An upgrade that changes the table's version does not end a model line."""
    rows = [at(logs.answers[n], minutes) for n, minutes in enumerate((-5, 0))]
    log = logs.write("a.jsonl", rows)
    first = logs.run(log, since="last")
    path = first.out / "trajectories.parquet"
    before = pq.read_table(path).drop_columns(["top_k"])
    pq.write_table(before.replace_schema_metadata({**before.schema.metadata, b"draftsmith.version": b"1"}), path)
    write(log, [*rows, at(logs.answers[2], 5)])
    inputs = {"earlier": logs.earlier(first, replayed=True)}
    ctx = logs.run(log, inputs=inputs, since="last", after=NOON, replay_share=0.5)
    assert responses(ctx) == [logs.answers[2]["response_ids"]]
    assert counts(ctx)["replay_left_out"] == "what is stored of answers"


def test_an_equal_answer_given_later_is_a_new_row(logs: Logs) -> None:
    log = logs.write("a.jsonl", [at(logs.answers[0], 0)])
    first = logs.run(log, since="last")
    write(log, [at(logs.answers[0], 0), at(logs.answers[0], 30)])
    assert len(table(following(logs, first, log))) == 1


def test_rows_outside_the_window_do_not_count_for_the_share_of_bad_rows(logs: Logs) -> None:
    """A window of ten rows, six of them of a new shape, after a thousand good rows."""
    old: list[Row | str] = [at(logs.answers[0], -600 - number) for number in range(1000)]
    new: list[Row | str] = [at(row, number) for number, row in enumerate(logs.answers[:4])]
    new += [{"msgs": "?", "created": at(logs.answers[0], 1)["created"]} for _ in range(6)]
    log = logs.write("a.jsonl", [*old, *new])
    with pytest.raises(DraftsmithError, match=r"6 of 10 rows.*logs\.max_bad_share"):
        logs.run(log, since=NOON)
    assert len(table(logs.run(log, since=NOON, max_bad_share=0.6))) == 4


def test_bad_rows_among_old_rows_count_as_old(logs: Logs) -> None:
    """Lines without a time count as old as the row before them: a year of logs has a few."""
    old: list[Row | str] = [at(logs.answers[0], -600) for _ in range(50)]
    new: list[Row | str] = [at(row, number) for number, row in enumerate(logs.answers[:20])]
    log = logs.write("a.jsonl", [*old, '{"prompt_token_ids": [', '{"prompt', *new])
    ctx = logs.run(log, since=NOON, max_bad_share=0.01)
    assert counts(ctx)["set_aside"] == {"cannot be read": 2} and len(table(ctx)) == 20
    write(log, [*old, *new, '{"prompt_token_ids": ['])
    with pytest.raises(DraftsmithError, match=r"row 71: .*1 of 21 rows"):
        logs.run(log, since=NOON, max_bad_share=0.01)
