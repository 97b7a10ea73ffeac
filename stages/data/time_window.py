"""When a row was logged, and windows of time: `7d`, `12h`, or an ISO time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

from pydantic import BeforeValidator

from draftsmith.stages.runtime.stage import InputListing

TIME_FIELDS = ("timestamp", "created", "created_at", "time")
LAST = "last"  # a window that begins behind what an earlier refresh has read: whoever runs refreshes says where
_RELATIVE = re.compile(r"(\d{1,6})\s*([dh])")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def row_time(fields: Mapping[str, Any]) -> datetime | None:
    """Return the row's time in UTC, None if it says none that can be read."""
    for each in TIME_FIELDS:
        if (value := fields.get(each)) is not None:
            return as_time(value)
    return None


def as_time(value: Any) -> datetime | None:
    """Read ISO text, or seconds since 1970 (by their size also milli-, micro-, nanoseconds); without a zone: UTC."""
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
    if re.fullmatch(r"\d{8}", text) is None:  # else a date
        with suppress(ValueError):
            return _from_number(float(text))
    return _utc(datetime.fromisoformat(text))


def _from_number(number: float) -> datetime:
    """Seconds have 10 digits for the next 260 years, milliseconds 13."""
    for scale in (1, 1_000, 1_000_000, 1_000_000_000):
        if abs(number) < 1e11 * scale:
            return _EPOCH + timedelta(seconds=number / scale)
    raise ValueError("no time")


def _utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def iso(time: datetime) -> str:
    """As it stands in configs and artifacts: UTC with a Z."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def is_relative(window: str) -> bool:
    """Return whether a window means another time in every run, as 7d and 12h do."""
    return _RELATIVE.fullmatch(window.strip()) is not None


def beginning(window: str | None, listing: InputListing | None) -> datetime | None:
    """Return where a window begins: as the run's listing has it, else now. None for no window and for `last`."""
    if window is None or window == LAST:
        return None
    known = None if listing is None else listing.since.get(window)
    return as_time(known or absolute(window, datetime.now(UTC)))


def _window(value: Any) -> Any:
    """Read a window of a config: one of days or hours stays as it was written, YAML reads a date or a time as one."""
    if isinstance(value, date):
        value = iso(as_time(value) or _EPOCH)
    if not isinstance(value, str):
        return value
    begins = absolute(value, datetime.now(UTC))
    return value.strip() if is_relative(value) else begins


Since = Annotated[str, BeforeValidator(_window)]  # of a field


def absolute(window: str, now: datetime) -> str:
    """Where a window begins, as ISO text; `last` stays as it is.

    `Nd` begins at a midnight and `Nh` at a full hour (UTC), at least N days or hours before `now`: whoever asks again
    on the same day, or in the same hour, means the same window. Raises ValueError with what is expected.
    """
    text = window.strip()
    if text == LAST:
        return LAST
    if match := _RELATIVE.fullmatch(text):
        count, unit = int(match[1]), match[2]
        try:
            start = now.astimezone(UTC) - (timedelta(days=count) if unit == "d" else timedelta(hours=count))
        except OverflowError:
            raise ValueError(f"{window!r} begins before all times: give fewer days") from None
        start = start.replace(minute=0, second=0, microsecond=0)
        return iso(start.replace(hour=0) if unit == "d" else start)
    try:
        return iso(_utc(datetime.fromisoformat(text)))
    except (ValueError, OverflowError):
        raise ValueError(f"{window!r} is no window: give 7d, 12h, an ISO date or time, or last") from None
