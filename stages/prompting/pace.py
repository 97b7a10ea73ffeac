"""When to say how far a long step is: now and then, however many rows there are and however long one takes."""

from __future__ import annotations

import time

_EVERY_S = 1.0


class Pace:
    """Counts rows, and tells when it is time."""

    def __init__(self) -> None:
        self.rows, self._said = 0, time.monotonic()

    def step(self) -> bool:
        """Of one row more: has nothing been said for a second?"""
        self.rows += 1
        now = time.monotonic()
        if now - self._said < _EVERY_S:
            return False
        self._said = now
        return True
