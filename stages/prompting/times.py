"""When a row was logged, and windows of time: `7d`, `12h`, or an ISO time."""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, date, datetime, timedelta
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator

from draftsmith.stages.contract import Listing

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
    """ISO text, or seconds since 1970 (from their size also milli-, micro- and nanoseconds); without a zone: UTC."""
    try:
        if isinstance(value, str):
            return _from_text(value.strip())
        if isinstance(value, datetime):
            return _utc(value)
        if isinstance(value, date):
            return datetime(value.year, value.month, value.day, tzinfo=UTC)
        if isinstance(value, int | float) and not isinstance(value, bool):
            return _from_number(float(value))
    except (ValueError, OverflowError):
        pass
    return None


def _from_text(text: str) -> datetime:
    try:
        return _from_number(float(text)) if not re.fullmatch(r"\d{8}", text) else _utc(datetime.fromisoformat(text))
    except ValueError:
        return _utc(datetime.fromisoformat(text))


def _from_number(number: float) -> datetime:
    """Seconds have 10 digits for the next 260 years, milliseconds 13."""
    for scale in (1, 1_000, 1_000_000, 1_000_000_000):
        if abs(number) < 1e11 * scale:
            return _EPOCH + timedelta(seconds=number / scale)
    raise ValueError("no time")


def _utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def as_text(value: object) -> object:
    """Of a config's field: YAML reads a date or a time as one. Anything else stays what it is."""
    time = None if isinstance(value, str | int | float) else as_time(value)
    return value if time is None else iso(time)


def iso(time: datetime) -> str:
    """As it stands in configs and artifacts: UTC with a Z."""
    return time.astimezone(UTC).isoformat().replace("+00:00", "Z")


def is_relative(window: str) -> bool:
    """Return whether a window means another time in every run, as 7d and 12h do."""
    return _RELATIVE.fullmatch(window.strip()) is not None


def beginning(window: str | None, listing: Listing | None) -> datetime | None:
    """Return where a window begins: as the run's listing has it, else now. None for no window and for `last`."""
    if window is None or window == LAST:
        return None
    known = None if listing is None else listing.since.get(window)
    return as_time(known or absolute(window, datetime.now(UTC)))


def _read(window: str) -> str:
    begins = absolute(window, datetime.now(UTC))
    return window.strip() if is_relative(window) else begins


# of a field: a window of days or hours as it was written, any other as ISO text
Since = Annotated[
    str,
    BeforeValidator(as_text),
    AfterValidator(_read),
]


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
