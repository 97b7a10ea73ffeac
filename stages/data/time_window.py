"""Times of rows, and time windows: `7d`, `12h`, or an ISO time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

from pydantic import BeforeValidator

from draftsmith.stages.runtime.stage import InputListing

TIME_FIELDS = ("timestamp", "created", "created_at", "time")
LAST = "last"  # a window that begins after what an earlier refresh has read; `flows/refresh` sets where
_RELATIVE = re.compile(r"(\d{1,6})\s*([dh])")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def row_time(fields: Mapping[str, Any]) -> datetime | None:
    """Return the row's time in UTC; None if it has no readable one."""
    for name in TIME_FIELDS:
        if (value := fields.get(name)) is not None:
            return parse_time(value)
    return None


def parse_time(value: Any) -> datetime | None:
    """Parse ISO text, or seconds since 1970 (by size also milli-, micro-, nanoseconds). Without a time zone: UTC."""
    try:
        if isinstance(value, date):  # a datetime is one too
            value = value.isoformat()
        if isinstance(value, str):
            return _from_text(value.strip())
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _from_number(float(value))
    except (ValueError, OverflowError):
        pass
    return None


def _from_text(text: str) -> datetime:
    if re.fullmatch(r"\d{8}", text) is None:  # eight digits are a date
        with suppress(ValueError):
            return _from_number(float(text))
    return _utc(datetime.fromisoformat(text))


def _from_number(number: float) -> datetime:
    """Return the time of a number; for the next 260 years, seconds have 10 digits and milliseconds 13."""
    for scale in (1, 1_000, 1_000_000, 1_000_000_000):
        if abs(number) < 1e11 * scale:
            return _EPOCH + timedelta(seconds=number / scale)
    raise ValueError("no time")


def _utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def to_iso(time: datetime) -> str:
    """Return a time as configs and artifacts write it: UTC with a Z."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def is_relative(window: str) -> bool:
    """Return whether a window such as 7d or 12h begins at another time in every run."""
    return _RELATIVE.fullmatch(window.strip()) is not None


def window_start(window: str | None, listing: InputListing | None) -> datetime | None:
    """Return a window's start, from the run's listing or else counted back from now; None for `last` or no window."""
    if window is None or window == LAST:
        return None
    listed = None if listing is None else listing.since.get(window)
    return parse_time(listed or resolve_window(window, datetime.now(UTC)))


def _window(value: Any) -> Any:
    """Validate a window of a config. Days and hours stay as written; dates and times, which YAML parses, become ISO."""
    if isinstance(value, date):
        value = to_iso(parse_time(value) or _EPOCH)
    if not isinstance(value, str):
        return value
    start = resolve_window(value, datetime.now(UTC))
    return value.strip() if is_relative(value) else start


Since = Annotated[str, BeforeValidator(_window)]


def resolve_window(window: str, now: datetime) -> str:
    """Return when a window begins, as ISO text; `last` stays as it is.

    `Nd` begins at midnight and `Nh` at a full hour (UTC), at least N days or hours before `now`, so that it means the
    same window all day or all hour. Raises ValueError for anything that is not a window.
    """
    text = window.strip()
    if text == LAST:
        return LAST
    if match := _RELATIVE.fullmatch(text):
        count, unit = int(match[1]), match[2]
        try:
            start = now.astimezone(UTC) - (timedelta(days=count) if unit == "d" else timedelta(hours=count))
        except OverflowError:
            raise ValueError(f"{window!r} begins before the year 1. Use fewer days.") from None
        start = start.replace(minute=0, second=0, microsecond=0)
        return to_iso(start.replace(hour=0) if unit == "d" else start)
    try:
        return to_iso(_utc(datetime.fromisoformat(text)))
    except (ValueError, OverflowError):
        raise ValueError(f"{window!r} is not a window. Use 7d, 12h, an ISO date or time, or last.") from None
