"""Times of rows in every format of logs, and windows that mean the same all day."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.stages.data.time_window import parse_time, resolve_window, row_time, to_iso

NOON = datetime(2026, 3, 5, 12, 34, 56, tzinfo=UTC)
SECONDS = 1772714096  # NOON


@pytest.mark.parametrize(
    "value",
    [
        "2026-03-05T12:34:56Z", "2026-03-05 12:34:56", "2026-03-05T13:34:56+01:00", "20260305T123456Z",
        SECONDS, float(SECONDS), str(SECONDS), SECONDS * 1_000, SECONDS * 1_000_000, SECONDS * 1_000_000_000,
        NOON, NOON.replace(tzinfo=None), NOON.astimezone(timezone(timedelta(hours=5))),
    ],
)  # fmt: skip
def test_times_are_parsed_in_every_format(value: Any) -> None:
    assert parse_time(value) == NOON


@pytest.mark.parametrize("value", ["2026-03-05", "20260305", date(2026, 3, 5)])
def test_a_date_means_midnight(value: Any) -> None:
    assert parse_time(value) == datetime(2026, 3, 5, tzinfo=UTC)


@given(st.one_of(st.text(max_size=30), st.integers(), st.floats(), st.booleans(), st.none(), st.lists(st.integers())))
def test_anything_else_is_not_a_time(value: Any) -> None:
    assert parse_time(value) is None or parse_time(value).tzinfo is UTC  # type: ignore[union-attr]


def test_the_usual_fields_are_tried() -> None:
    assert row_time({"created": SECONDS}) == row_time({"time": to_iso(NOON)}) == NOON
    assert row_time({"timestamp": SECONDS, "created_at": 0}) == NOON
    assert row_time({"at": SECONDS}) is None


@pytest.mark.parametrize(
    ("window", "start"),
    [
        ("7d", "2026-02-26T00:00:00Z"),
        ("12h", "2026-03-05T00:00:00Z"),
        ("1h", "2026-03-05T11:00:00Z"),
        ("2026-03-01", "2026-03-01T00:00:00Z"),
        ("2026-03-01T06:00:00+06:00", "2026-03-01T00:00:00Z"),
        ("last", "last"),
    ],
)
def test_an_absolute_window_stays_the_same(window: str, start: str) -> None:
    assert resolve_window(window, NOON) == start
    assert resolve_window(start, NOON + timedelta(days=3)) == start


@given(st.integers(0, 86_399), st.integers(0, 86_399))
def test_a_window_of_days_is_the_same_all_day(one: int, other: int) -> None:
    midnight = datetime(2026, 3, 5, tzinfo=UTC)
    now = midnight + timedelta(seconds=one)
    start = resolve_window("3d", now)
    assert start == resolve_window("3d", midnight + timedelta(seconds=other))
    assert timedelta(days=3) <= now - datetime.fromisoformat(start) < timedelta(days=4)


@pytest.mark.parametrize("window", ["7 weeks", "", "yesterday", "-3d", "999999d"])
def test_anything_else_is_not_a_window(window: str) -> None:
    with pytest.raises(ValueError, match="Use"):
        resolve_window(window, NOON)
