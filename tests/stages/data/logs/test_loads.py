"""Requests in flight by the times of logged rows, where the truth is known."""

from __future__ import annotations

import random
from datetime import UTC, datetime
from typing import Any

import pytest

from draftsmith.stages.data.logs.filter import InFlight, SchemaFilter
from draftsmith.stages.evaluation.gate import GateConfig
from tests.stages.data.logs.logs_run import Logs, accepted, as_ids, counts, schema_filter

NOON = 1772714096
ROW = {"prompt_token_ids": [1, 2], "completion_token_ids": [3, 4]}


def spans(*groups: tuple[int, float, float], **fields: Any) -> list[dict[str, Any]]:
    """Return rows: numbers of requests, with begin and end in seconds after noon."""
    return [
        ROW | {"started_at": NOON + begin, "ended_at": NOON + end, **fields}
        for count, begin, end in groups
        for _ in range(count)
    ]


# 100 s with one request, 60 s with eight, nothing for 1,000 s, 40 s with 32
KNOWN = [(1, 0.0, 160.0), (7, 100.0, 160.0), (32, 1160.0, 1200.0)]


def shares_of(rows: list[dict[str, Any]]) -> dict[int, float]:
    found = InFlight()
    for row in rows:
        found.add(row)
    return found.shares()


def test_shares_are_those_of_the_time_with_requests_whatever_the_order_of_rows() -> None:
    rows = spans(*KNOWN)
    random.Random(0).shuffle(rows)
    assert shares_of(rows) == {1: 0.5, 8: 0.3, 32: 0.2}
    assert GateConfig(loads=shares_of(rows)).loads == {1: 0.5, 8: 0.3, 32: 0.2}


@pytest.mark.parametrize("number", range(1, 130))
def test_numbers_are_counted_at_the_nearest_power_of_two(number: int) -> None:
    (power,) = shares_of(spans((number, 0.0, 1.0)))
    assert power & (power - 1) == 0 and power / 2**0.5 < number < power * 2**0.5


def test_two_of_start_end_and_duration_are_enough_in_any_format() -> None:
    begin = datetime.fromtimestamp(NOON, UTC).isoformat()
    rows: list[dict[str, Any]] = [
        {"started_at": begin, "ended_at": (NOON + 8) * 1000},
        {"started_at": str(NOON), "duration_s": 8},
        {"ended_at": NOON + 8.0, "duration_s": 8.0},
        {"started_at": NOON, "ended_at": NOON + 8, "duration_s": 5},  # without a wait in front of the server
    ]
    assert shares_of(rows) == {4: 1.0}


def test_servers_are_counted_apart() -> None:
    rows = spans((4, 0.0, 10.0), server="a") + spans((4, 5.0, 15.0), server="b")
    assert shares_of(rows) == {4: 1.0}
    assert shares_of([row | {"server": None} for row in rows]) == {4: 0.667, 8: 0.333}


@pytest.mark.parametrize(
    "row",
    [
        {}, {"started_at": NOON}, {"ended_at": NOON}, {"duration_s": 3.0}, {"started_at": NOON, "ended_at": NOON - 1},
        {"started_at": NOON, "duration_s": -1}, {"started_at": NOON, "duration_s": float("nan")},
        {"started_at": NOON, "duration_s": True}, {"started_at": 0, "ended_at": NOON}, {"timestamp": NOON},
    ],
)  # fmt: skip
def test_a_row_without_both_times_counts_nothing(row: dict[str, Any]) -> None:
    found = InFlight()
    found.add(row)
    assert (found.timed, found.untimed, found.shares()) == (0, 1, {})


def filtered(rows: list[dict[str, Any]], **config: Any) -> SchemaFilter:
    row_filter = schema_filter(1, **config)
    accepted(row_filter, rows)
    return row_filter


def test_rows_that_cannot_be_trained_on_count_and_those_of_other_models_do_not() -> None:
    ours = spans((2, 0.0, 10.0), model="ours")
    ours[0]["temperature"] = 0.7
    theirs = spans((30, 0.0, 10.0), model="theirs")
    found = filtered(ours + theirs, filter={"model": "ours"})
    assert found.accepted == 1 and found.in_flight.shares() == {2: 1.0} and found.warnings() == []


def test_rows_without_times_are_a_warning_if_others_have_some_or_the_config_names_them() -> None:
    assert filtered([ROW, ROW]).warnings() == []
    (some,) = filtered([*spans((3, 0.0, 1.0)), ROW]).warnings()
    assert some.startswith("1 of 4 rows do not say when")
    (none,) = filtered([ROW, ROW], fields={"started_at": "begun", "duration_s": "latency"}).warnings()
    assert none.startswith("2 of 2 rows do not say when") and "started_at, ended_at, duration_s in logs.fields" in none


def test_the_stage_states_the_loads_by_the_configs_names(logs: Logs) -> None:
    times = [{"at": row["started_at"], "took": row["ended_at"] - row["started_at"]} for row in spans(*KNOWN)]
    rows = [as_ids(answer) | time for answer, time in zip(logs.answers, times, strict=False)]
    assert len(rows) == len(times)
    ctx = logs.run(rows, fields={"started_at": "at", "duration_s": "took"})
    assert counts(ctx)["loads"] == {"1": 0.5, "8": 0.3, "32": 0.2}
    assert "requests in flight, by the times of 40 rows: gate.loads: {1: 0.5, 8: 0.3, 32: 0.2}" in ctx.logs
