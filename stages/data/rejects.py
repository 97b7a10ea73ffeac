"""Rows that are not used: counted by reason, listed with file and row, and an error where too many cannot be read."""

from __future__ import annotations

import json
from collections import Counter
from typing import TextIO

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.row_files import BadRow, CutOff

UNREADABLE = "cannot be read"


def by_frequency(reasons: Counter[str]) -> str:
    """Return how often each reason came up, most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


class Aside:
    """What was set aside so far. A row is good, unusable (fit for nothing here) or bad (nobody can read it)."""

    def __init__(self, field: str, max_bad_share: float, listed: TextIO | None = None):
        """field: names `max_bad_share` in errors. listed: takes one JSON object a line."""
        self._field, self._most, self._listed = field, max_bad_share, listed
        self.reasons: Counter[str] = Counter()
        self.rows = 0  # read so far
        self.outside = 0  # of them, those outside a window: no part of what the share is of
        self.cut_off = 0  # of them, missing ends of files
        self._first: BadRow | None = None
        self._counted = 0  # of the bad rows, those that are part of it

    @property
    def bad(self) -> int:
        return self.reasons[UNREADABLE]

    def unusable(self, file: str, number: int, log_id: str | None, reason: str) -> None:
        self.reasons[reason] += 1
        self._list(file, number, log_id, reason)

    def unreadable(self, row: BadRow, log_id: str | None = None, *, outside: bool = False) -> None:
        """Raises DraftsmithError at once where no bad row is allowed. outside: of the window, as far as one can say."""
        self.reasons[UNREADABLE] += 1
        self.cut_off += isinstance(row, CutOff)
        if outside:
            self.outside += 1
        else:
            self._first = self._first or row
            self._counted += 1
        self._list(row.file, row.number, log_id, f"{UNREADABLE}: {row.reason}")
        if self._most == 0:
            raise DraftsmithError(f"{row.where}: {row.reason}")

    def check(self) -> None:
        """Raises DraftsmithError if more of the rows read were bad than is allowed."""
        rows = self.rows - self.outside
        if self._first is not None and self._counted > self._most * max(rows, 1):
            window = " inside the window" if self.outside else ""
            raise DraftsmithError(
                f"{self._first.where}: {self._first.reason} ({self._counted} of {rows} rows{window} cannot be read, "
                f"over {self._field} {self._most:g})"
            )

    def said(self) -> str:
        return by_frequency(self.reasons)

    def _list(self, file: str, number: int, log_id: str | None, reason: str) -> None:
        if self._listed is not None:
            entry = {"file": file, "row": number, "id": log_id, "reason": reason}
            self._listed.write(json.dumps(entry, ensure_ascii=True) + "\n")
