"""What checks found: one line each, and an error of one check never keeps the others from running."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from draftsmith.artifacts.errors import DraftsmithError, from_os_error


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """One line: how bad, which check, what was found and what to do."""

    level: Level
    check: str
    text: str


@dataclass
class Findings:
    """What was found so far."""

    lines: list[Finding] = field(default_factory=list)

    def ok(self, check: str, text: str) -> None:
        self.lines.append(Finding(Level.OK, check, text))

    def warn(self, check: str, text: str) -> None:
        self.lines.append(Finding(Level.WARNING, check, text))

    def error(self, check: str, text: str) -> None:
        self.lines.append(Finding(Level.ERROR, check, text))

    @contextmanager
    def part(self, check: str) -> Iterator[None]:
        """A check whose error is a finding: the others go on."""
        try:
            yield
        except DraftsmithError as error:
            self.error(check, " ".join(str(error).split()))
        except OSError as error:
            self.error(check, str(from_os_error(error, "reading")))
        except Exception as error:  # a defect of the check, or of a library that it asks: the others are still worth it
            self.error(check, f"unexpected {type(error).__name__}: {' '.join(str(error).split())}")

    @property
    def errors(self) -> int:
        return sum(line.level is Level.ERROR for line in self.lines)
