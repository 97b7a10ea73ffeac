"""Rows that are not used: counted by reason, listed with file and row, and an error if too many cannot be read."""

from __future__ import annotations

import json
from collections import Counter
from typing import TextIO

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.data.row_files import BadRow, TruncatedFile

UNREADABLE = "cannot be read"


def describe_counts(reasons: Counter[str]) -> str:
    """Return how often each reason occurred, the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common())


class RejectLog:
    """The rows that were rejected so far: those that are unusable here, and those that nobody can read (bad rows)."""

    def __init__(self, field: str, max_bad_share: float, lines: TextIO | None = None):
        """Start an empty log. field: the config field of `max_bad_share`, for errors. lines: receives JSON Lines."""
        self._field, self._max_bad_share, self._lines = field, max_bad_share, lines
        self.reasons: Counter[str] = Counter()
        self.rows = 0  # all rows read so far
        self.outside = 0  # of these, the rows outside the time window, which do not count for the share
        self.truncated = 0  # of these, missing ends of files
        self._first: BadRow | None = None
        self._counted = 0  # bad rows inside the window

    @property
    def bad(self) -> int:
        return self.reasons[UNREADABLE]

    def add_unusable(self, file: str, number: int, log_id: str | None, reason: str) -> None:
        self.reasons[reason] += 1
        self._write(file, number, log_id, reason)

    def add_unreadable(self, row: BadRow, log_id: str | None = None, *, outside: bool = False) -> None:
        """Count a bad row. Raises DraftsmithError if none is allowed. outside: probably outside the time window."""
        self.reasons[UNREADABLE] += 1
        self.truncated += isinstance(row, TruncatedFile)
        if outside:
            self.outside += 1
        else:
            self._first = self._first or row
            self._counted += 1
        self._write(row.file, row.number, log_id, f"{UNREADABLE}: {row.reason}")
        if self._max_bad_share == 0:
            raise DraftsmithError(f"{row.where}: {row.reason}")

    def check(self) -> None:
        """Raise DraftsmithError if a larger share of the rows is bad than is allowed."""
        rows = self.rows - self.outside
        if self._first is not None and self._counted > self._max_bad_share * max(rows, 1):
            window = " inside the window" if self.outside else ""
            raise DraftsmithError(
                f"{self._first.where}: {self._first.reason.removesuffix('.')} ({self._counted} of {rows} rows{window} "
                f"cannot be read, over {self._field} {self._max_bad_share:g})"
            )

    def describe(self) -> str:
        """Return the counts by reason."""
        return describe_counts(self.reasons)

    def _write(self, file: str, number: int, log_id: str | None, reason: str) -> None:
        if self._lines is not None:
            entry = {"file": file, "row": number, "id": log_id, "reason": reason}
            self._lines.write(json.dumps(entry, ensure_ascii=True) + "\n")
