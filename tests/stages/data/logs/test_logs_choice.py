"""The answers that stage `logs` uses: time windows and rows that come late, earlier answers, and bad rows."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.tables.parquet import read_table, write_table
from draftsmith.artifacts.tables.schemas import TRAJECTORIES
from draftsmith.stages.data.logs.earlier import ORIGIN
from draftsmith.stages.data.logs.filter import SchemaFilter
from draftsmith.stages.data.logs.stage import LogsConfig
from draftsmith.stages.data.time_window import parse_time, to_iso
from draftsmith.stages.data.trajectories import load_trajectories
from draftsmith.stages.targets.sampling import SamplingParams
from tests.stages.data.logs.logs_run import (
    Logs,
    Row,
    accepted,
    as_ids,
    counts,
    given_by,
    schema_filter,
    set_aside,
    table,
    write,
)
from tests.testbed.context import RecordingContext
from tests.testbed.drafter import DrafterArtifacts


def responses(rows: list[Row]) -> list[list[int]]:
    return [row["response_ids"] for row in rows]


def timed(row: Row, time: Any, field: str = "timestamp") -> Row:
    return as_ids(row) | {field: time}


def test_bad_rows_are_rejected_up_to_a_share(logs: Logs) -> None:
    good = [as_ids(row) for row in logs.answers[:18]]
    path = logs.write("log.jsonl", [*good, {"prompt_token_ids": [1], "id": "x"}, '{"prompt_token_ids": [1, '])
    ctx = logs.run(path, max_bad_share=0.1)
    assert responses(table(ctx)) == responses(logs.answers[:18])
    assert counts(ctx)["set_aside"] == {"cannot be read": 2}
    shape, half = set_aside(ctx)
    assert (shape["row"], shape["id"], half["row"], half["id"]) == (19, "x", 20, None)
    assert shape["reason"].startswith("cannot be read: completion_token_ids must be") and "not JSON" in half["reason"]
    with pytest.raises(DraftsmithError, match=r"row 19: .*2 of 20 rows.*logs\.max_bad_share"):
        logs.run(path, max_bad_share=0.09)
    with pytest.raises(DraftsmithError, match=r"log\.jsonl, row 19: completion_token_ids"):
        logs.run(path, max_bad_share=0)
    assert not list((logs.folder / "run-3" / "run" / "out").iterdir())


def test_a_filter_excludes_answers_of_another_model(logs: Logs) -> None:
    models = ["ours", "theirs", "ours-v2"]
    rows = [as_ids(row) | {"model": models[n % 3]} for n, row in enumerate(logs.answers[:9])]
    path = logs.write("log.jsonl", rows)
    ctx = logs.run(path, filter={"model": ["ours", "ours-v2"]})
    assert responses(table(ctx)) == responses([row for n, row in enumerate(logs.answers[:9]) if n % 3 != 1])
    assert (counts(ctx)["filtered"], counts(ctx)["set_aside"]) == (3, {})
    assert not [line for line in ctx.logs if "models" in line]
    mixed = logs.run(path)
    assert [line for line in mixed.logs if "the rows name 3 models" in line]
    with pytest.raises(DraftsmithError, match="9 not let through by filter"):
        logs.run(path, filter={"model": "nobody's"})


def test_a_window_skips_older_rows_and_rejects_rows_without_a_time(logs: Logs) -> None:
    noon = datetime(2026, 3, 5, 12, tzinfo=UTC)
    times: list[Any] = [noon - timedelta(seconds=1), noon, noon + timedelta(hours=1)]
    rows = [timed(row, time.isoformat()) for row, time in zip(logs.answers[:3], times, strict=True)]
    rows += [as_ids(logs.answers[3]), timed(logs.answers[4], "tomorrow")]
    rows += [timed(logs.answers[5], noon.timestamp() * 1000, "created")]
    path = logs.write("log.jsonl", rows)
    ctx = logs.run(path, since="2026-03-05T12:00:00Z")
    assert responses(table(ctx)) == responses([logs.answers[n] for n in (1, 2, 5)])
    found = counts(ctx)
    assert (found["outside_window"], found["set_aside"]) == (
        1,
        {"no time that can be read in timestamp, created, created_at, time (logs.fields names another)": 2},
    )
    assert found["window"] == {"since": "2026-03-05T12:00:00Z", "after": None, "newest": "2026-03-05T13:00:00Z"}
    again = logs.run(path, since="last", after="2026-03-05T12:00:00Z")
    assert responses(table(again)) == responses(logs.answers[2:3])  # after the newest row read: not the same time again
    everything = logs.run(path, since="last")  # a first refresh: the next needs times
    assert len(table(everything)) == 4 and counts(everything)["window"]["newest"] == "2026-03-05T13:00:00Z"
    with pytest.raises(DraftsmithError, match=r"3 rows .*2026-04-01T00:00:00Z or later"):
        logs.run(logs.write("old.jsonl", rows[:3]), since="2026-04-01")
    with pytest.raises(DraftsmithError, match=r"3 rows .*later than 2026-04-01T00:00:00Z"):
        logs.run(logs.folder / "old.jsonl", since="last", after="2026-04-01T00:00:00Z")


def test_a_row_from_the_future_does_not_move_the_next_window(logs: Logs) -> None:
    ctx = logs.run([timed(logs.answers[0], "2026-03-05"), timed(logs.answers[1], "2999-01-01")], since="2026-03-01")
    assert counts(ctx)["window"]["newest"] == "2026-03-05T00:00:00Z"
    assert counts(ctx)["set_aside"] == {"time in the future": 1}


def test_a_clock_that_is_ahead_loses_no_row_of_the_next_week(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two refreshes a week apart, on rows of every hour; the last row of the first week is dated 23 hours ahead."""

    def refresh(now: datetime, **window: Any) -> SchemaFilter:
        monkeypatch.setattr("draftsmith.stages.data.logs.filter.datetime", SimpleNamespace(now=lambda _zone: now))
        row_filter = schema_filter(lateness_hours=0, since="last", **window)
        times = [*(now - timedelta(hours=hours) for hours in range(168)), monday + timedelta(hours=23)]
        ids = {"prompt_token_ids": [1, 2], "completion_token_ids": [3, 4]}
        accepted(row_filter, [ids | {"timestamp": to_iso(time)} for time in times])
        return row_filter

    monday = datetime(2026, 3, 9, tzinfo=UTC)
    first = refresh(monday)
    assert (first.accepted, first.newest, dict(first.rejects.reasons)) == (168, monday, {"time in the future": 1})
    second = refresh(monday + timedelta(days=7), after=to_iso(monday))
    assert (second.accepted, second.outside_window, second.rejects.reasons.total()) == (168 + 1, 0, 0)


def test_a_window_before_another_one_is_read_completely(logs: Logs) -> None:
    """Two hosts serve all day: no row of either host is skipped between two windows."""
    for host, rows in (("a", logs.answers[:10]), ("b", logs.answers[10:20])):
        served = [timed(row, f"2026-03-05T{hour:02}:00:00Z") for hour, row in enumerate(rows)]
        (logs.folder / "logs").mkdir(exist_ok=True)
        write(logs.folder / "logs" / f"host-{host}.jsonl", served)
    for begin, after in ((0, None), (2, "2026-03-05T01:00:00Z")):
        ctx = logs.run(logs.folder / "logs", since="last", rows=4, after=after)
        found = counts(ctx)
        assert responses(table(ctx)) == responses(logs.answers[begin : begin + 4])
        assert (found["rows_read"], found["not_drawn"]) == (20, 20 - 2 * begin - 4)
        assert found["window"]["newest"] == "2026-03-05T09:00:00Z"
    alone = logs.run(logs.folder / "logs", since="2026-03-05", rows=4)
    assert counts(alone)["rows_read"] == 4, "no window follows this one"
    assert counts(alone)["rows_in_files"] is None, "nor were they all looked at to count them"


def test_a_relative_window_keeps_its_text_and_begins_at_midnight() -> None:
    config = LogsConfig.model_validate({"paths": "a", "temperature": 0, "since": " 7d"})
    assert config.since == "7d" and config.since_time is not None
    assert to_iso(config.since_time).endswith("T00:00:00Z") and config.in_window(datetime.now(UTC))
    assert LogsConfig.model_validate(config.model_dump(mode="json")) == config  # what the stage's process is sent
    of_yaml = LogsConfig.model_validate({"paths": "a", "temperature": 0, "since": datetime(2026, 3, 5).date()})
    assert of_yaml.since == "2026-03-05T00:00:00Z"


@pytest.fixture
def earlier(tmp_path: Path, tiny_drafter: DrafterArtifacts) -> Path:
    """Return an artifact with other answers to training prompts, and rows that must not be mixed in."""
    rows = read_table(tiny_drafter.rollout / "trajectories.parquet", TRAJECTORIES).to_pylist()[60:140]
    heldout = read_table(tiny_drafter.heldout / "trajectories.parquet", TRAJECTORIES).to_pylist()
    sampled = [row | {"temperature": 1.0} for row in rows[:20]]
    folder = tmp_path / "earlier"
    disguised = [row | {"split": "train"} for row in heldout]
    write_table(folder / "trajectories.parquet", TRAJECTORIES, [*disguised, *sampled, *rows[20:]])
    (folder / ORIGIN).write_text(json.dumps(given_by(tiny_drafter.target)))
    return folder


def test_a_share_of_the_answers_is_replayed_from_an_earlier_refresh(logs: Logs, earlier: Path) -> None:

    def mixed(seed: int = 0, **config: Any) -> tuple[list[Row], Row]:
        inputs = {"earlier": earlier, "prompts": logs.made.prompts}
        ctx = logs.run([as_ids(row) for row in logs.answers[:40]], inputs=inputs, seed=seed, **config)
        return table(ctx), counts(ctx)

    rows, found = mixed(replay_share=0.2)
    assert (found["used"], found["replayed"], len(rows)) == (40, 10, 50)
    assert len({row["trajectory_id"] for row in rows}) == 50
    allowed = read_table(logs.made.rollout / "trajectories.parquet", TRAJECTORIES).to_pylist()[80:140]
    replayed = [tuple(ids) for ids in responses(rows[40:])]
    assert {*replayed} <= {tuple(ids) for ids in responses(allowed)} and len({*replayed}) == 10
    again, _ = mixed(seed=1, replay_share=0.2)
    assert {tuple(ids) for ids in responses(again[40:])} != {*replayed}
    bounded, found = mixed(replay_share=0.25, rows=20)
    assert (found["used"], found["replayed"], len(bounded)) == (15, 5, 20)
    _, found = mixed(replay_share=0.9)
    assert (found["used"], found["replayed"]) == (40, 60)  # all that there are
    none, found = mixed()
    assert len(none) == 40 and found["replayed"] == 0


def test_earlier_answers_with_other_sampling_are_left_out(logs: Logs) -> None:
    """Trajectories must have one sampling; greedy answers have no top-p and no top-k."""
    rows = read_table(logs.made.rollout / "trajectories.parquet", TRAJECTORIES).to_pylist()[60:90]
    folder = logs.folder / "earlier"

    def mixed(temperature: float) -> tuple[RecordingContext, SamplingParams]:
        others = [{"top_p": 0.8}] * 15 + [{"top_k": 0}] * 5 + [{"top_k": 40}] * 5 + [{}] * 5
        sampling = {"temperature": temperature, "top_p": 0.95, "top_k": 20}
        made = [row | sampling | other for row, other in zip(rows, others, strict=True)]
        write_table(folder / "trajectories.parquet", TRAJECTORIES, made)
        (folder / ORIGIN).write_text(json.dumps(given_by(logs.made.target)))
        config: Row = {**sampling, "scored": 0, "replay_share": 0.5}
        ctx = logs.run([as_ids(row) for row in logs.answers[:40]], inputs={"earlier": folder}, **config)
        return ctx, load_trajectories(ctx.out).sampling

    ctx, sampling = mixed(0.7)
    assert counts(ctx)["replayed"] == 5
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == pytest.approx((0.7, 0.95, 20))
    assert any(line.startswith("25 answers of the earlier refresh are skipped") for line in ctx.logs)
    ctx, sampling = mixed(0.0)
    assert counts(ctx)["replayed"] == 30 and sampling.greedy
    assert not any("left out" in line for line in ctx.logs)


@pytest.mark.parametrize(
    ("digests", "changed"),
    [
        ({"target_digest": "t"}, "the target"),
        ({"target_digest": "t", "tokenizer_digest": "t"}, "the tokenizer and the target"),
        ({}, None),
    ],
)
def test_earlier_answers_of_another_target_are_left_out(
    logs: Logs, digests: dict[str, str], changed: str | None, earlier: Path
) -> None:
    path = logs.write("log.jsonl", [as_ids(row) for row in logs.answers[:40]])
    own = counts(logs.run(path))["given_by"]
    (earlier / ORIGIN).write_text(json.dumps(own | digests))
    inputs = {"earlier": earlier, "prompts": logs.made.prompts}
    ctx = logs.run(path, inputs=inputs, rows=40, replay_share=0.2)
    found = counts(ctx)
    assert (found["used"], found["replayed"]) == ((40, 0) if changed else (32, 8))
    assert found["replay_left_out"] == changed and ctx.summaries["replay_left_out"] == float(changed is not None)
    warnings = [line for line in ctx.logs if "no answers of the earlier refresh are mixed in" in line]
    assert len(warnings) == (changed is not None) and all(f"since {changed} changed" in line for line in warnings)


def test_earlier_answers_that_the_log_has_too_are_not_repeated(logs: Logs) -> None:
    folder = logs.folder / "earlier"
    folder.mkdir()
    shutil.copy(logs.made.rollout / "trajectories.parquet", folder)
    (folder / ORIGIN).write_text(json.dumps(given_by(logs.made.target)))
    ctx = logs.run([as_ids(row) for row in logs.answers], inputs={"earlier": folder}, replay_share=0.5)
    assert counts(ctx)["replayed"] == 60
    assert max(Counter((*row["prompt_ids"], -1, *row["response_ids"]) for row in table(ctx)).values()) == 1


def test_memory_is_bounded_for_long_logs(logs: Logs) -> None:
    """6,000 answers of 1,000 tokens, over 200 MB as Python integers, take less than 120 MB."""
    made = random.Random(0)
    with (logs.folder / "log.jsonl").open("w") as file:
        for number in range(6000):
            prompt = [5 + number % 800, 5 + number // 800]
            answer = made.choices(range(5, 800), k=1000)
            file.write(json.dumps({"prompt_token_ids": prompt, "completion_token_ids": answer}) + "\n")
    script = (
        "import resource, sys; from pathlib import Path; from tests.stages.data.logs.logs_run import run, table;"
        "from tests.testbed.drafter import DrafterArtifacts; folder = Path(sys.argv[1]);"
        "made = DrafterArtifacts(Path(sys.argv[2])).target;"
        "import json; (folder / 'one.jsonl').write_text(json.dumps("
        "{'prompt_token_ids': [5, 6], 'completion_token_ids': [7, 8, 9]}) + '\\n');"
        "run(folder / 'small', made, folder / 'one.jsonl', scored=0);"
        "start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "ctx = run(folder, made, folder / 'log.jsonl', scored=0); assert ctx.summaries['answers'] > 5000;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)"
    )
    arguments = [sys.executable, "-c", script, str(logs.folder), str(logs.made.root)]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 120 * 1024  # KiB


NOON = "2026-03-05T12:00:00Z"


def at(row: Row, minutes: float) -> Row:
    """Return the row logged this many minutes after noon."""
    noon = parse_time(NOON)
    assert noon is not None
    return as_ids(row) | {"created": int(noon.timestamp() + 60 * minutes)}


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
    assert responses(table(second)) == [row["response_ids"] for row in (twin, new, late, request)]
    found = counts(second)
    assert found["set_aside"] == {"used by the champion's refresh": 3} and len(set_aside(second)) == 3
    assert (found["outside_window"], found["window"]["newest"]) == (2, "2026-03-05T12:05:00Z")
    longer = following(logs, first, log, other, lateness_hours=2)
    assert responses(table(longer))[-1] == too_late["response_ids"] and len(responses(table(longer))) == 5


def test_without_new_rows_the_window_is_named_as_the_cause(logs: Logs) -> None:
    """Whatever speaks against the rows of the overlap, which are read again."""
    rows = [at(row, minutes) for row, minutes in zip(logs.answers[:4], (-90, -30, -1, 0), strict=True)]
    log = logs.write("a.jsonl", [*rows, at(logs.answers[4], -5) | {"temperature": 0.7}])
    first = logs.run(log, since="last")
    with pytest.raises(DraftsmithError, match=rf"none of 5 rows of .* is later than {NOON}.* an earlier logs\.since"):
        following(logs, first, log)


def test_without_lateness_or_earlier_answers_a_window_begins_after_the_newest_row(logs: Logs) -> None:
    log = logs.write("a.jsonl", [at(logs.answers[n], minutes) for n, minutes in enumerate((-5, 0, 5))])
    first = logs.run(log, since="last")
    settings: Row = {"since": "last", "after": NOON}
    for inputs, hours in (({"earlier": logs.earlier(first)}, 0), ({}, 1)):
        ctx = logs.run(log, inputs=inputs, lateness_hours=hours, **settings)
        assert responses(table(ctx)) == [logs.answers[2]["response_ids"]]
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
    assert responses(table(ctx)) == [logs.answers[2]["response_ids"]]
    assert counts(ctx)["replay_left_out"] == "the table of answers"


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
