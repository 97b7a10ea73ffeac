"""Requests in flight, by the times of logged rows: the shares that `gate.loads` takes."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from draftsmith.stages.data.time_window import parse_time

TIMES = ("started_at", "ended_at", "duration_s")  # our names of a row's fields; two of them are enough
_LONGEST_S = 86400.0  # a longer request has a wrong clock, or no real end


class InFlight:
    """When the requests of a log began and ended, by server."""

    def __init__(self) -> None:
        self.timed = self.untimed = 0  # rows
        self._spans: defaultdict[str, array[float]] = defaultdict(lambda: array("d"))  # server -> begin, end, begin, …

    def add(self, fields: Mapping[str, Any]) -> None:
        """Count a row. fields: under our names. Rows without `server` count as those of one server."""
        if (span := _span(fields)) is None:
            self.untimed += 1
            return
        self.timed += 1
        self._spans[str(fields.get("server"))].extend(span)

    def shares(self) -> dict[int, float]:
        """Return requests in flight, to the nearest power of two -> share of the time in which there are any."""
        seconds = np.zeros(64)  # by the logarithm of their number
        for spans in self._spans.values():
            times = np.asarray(spans)
            order = times.argsort(kind="stable")
            in_flight = np.tile([1, -1], len(times) // 2)[order].cumsum()[:-1]
            busy = in_flight > 0
            powers = np.log2(in_flight[busy]).round().astype(int)
            seconds += np.bincount(powers, np.diff(times[order])[busy], minlength=64)
        shares = (seconds / max(seconds.sum(), 1e-9)).round(3)
        return {1 << power: float(share) for power, share in enumerate(shares) if share > 0}


def _span(fields: Mapping[str, Any]) -> tuple[float, float] | None:
    """Return when a request began and ended, in seconds since 1970; None if the row does not say so."""
    begin, end = (None if (time := parse_time(fields.get(name))) is None else time.timestamp() for name in TIMES[:2])
    seconds = fields.get("duration_s")
    if isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds <= _LONGEST_S:
        begin = end - seconds if begin is None and end is not None else begin
        end = begin + seconds if end is None and begin is not None else end
    if begin is None or end is None or not 0 <= end - begin <= _LONGEST_S:
        return None
    return begin, end
