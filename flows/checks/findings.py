"""Collects the results of checks, one line each. `draftsmith check` prints all; a run stops at its first error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, from_os_error, one_line
from draftsmith.flows.execution.display import Display, escape


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"  # works, but less well than it could
    SKIPPED = "not checked"  # the line says why
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """The result of one check: level, name, cause and remedy."""

    level: Level
    check: str
    text: str
    unreachable: bool = False  # skipped because the hub, a bucket or a server could not be reached


@dataclass
class Findings:
    """Collects the results of checks. An error of one check never keeps the others from running."""

    lines: list[Finding] = field(default_factory=list)

    def ok(self, check: str, text: str) -> None:
        self.lines.append(Finding(Level.OK, check, text))

    def warn(self, check: str, text: str) -> None:
        self.lines.append(Finding(Level.WARNING, check, text))

    def skip(self, check: str, text: str, *, unreachable: bool = False) -> None:
        """Record a check that could not be made, and why. unreachable: a later try may succeed."""
        self._add(Finding(Level.SKIPPED, check, text, unreachable))

    def error(self, check: str, text: str) -> None:
        self._add(Finding(Level.ERROR, check, text))

    def _add(self, finding: Finding) -> None:
        """Add a line unless it is there: a plan that fails repeats the errors of single checks."""
        if not any(line == finding or line.text.endswith(f": {finding.text}") for line in self.lines):
            self.lines.append(finding)

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        """Record whatever the block raises under the check's name, so that the other checks go on."""
        try:
            yield
        except RetryableError as error:
            self.skip(name, str(error), unreachable=True)
        except DraftsmithError as error:
            self.error(name, str(error))
        except OSError as error:
            self.error(name, str(from_os_error(error, "reading")))
        except Exception as error:  # a defect of the check or of a library: the other checks are still useful
            self.error(name, f"unexpected {type(error).__name__}: {one_line(error)}")

    @property
    def errors(self) -> int:
        return self._count(Level.ERROR)

    @property
    def unreachable(self) -> list[str]:
        """Return the checks that were skipped because something could not be reached."""
        return list(dict.fromkeys(line.check for line in self.lines if line.unreachable))

    @property
    def summary(self) -> str:
        """Return one line that counts errors, warnings and skipped checks."""
        counts = [(self.errors, "error"), (self._count(Level.WARNING), "warning")]
        named = [f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts]
        return f"{', '.join(named)}, {self._count(Level.SKIPPED)} not checked"

    @property
    def remarks(self) -> list[str]:
        """Return the warnings and skipped checks as a run prints them."""
        shown = (Level.WARNING, Level.SKIPPED)
        return [f"{line.level.value}: {line.check}: {line.text}" for line in self.lines if line.level in shown]

    def _count(self, level: Level) -> int:
        return sum(line.level is level for line in self.lines)


class RaisingFindings(Findings):
    """Raises the first error, with the type of the exception that caused it."""

    def error(self, check: str, text: str) -> None:
        raise DraftsmithError(f"{check}: {text}")

    @contextmanager
    def check(self, name: str) -> Iterator[None]:
        try:
            yield
        except DraftsmithError as error:  # its type says whether a retry may help
            if str(error).startswith(f"{name}: "):
                raise
            raise type(error)(f"{name}: {error}") from error


def show(display: Display, lines: list[Finding]) -> None:
    """Print one line for each finding."""
    width = max(len(line.check) for line in lines)
    level_width = max(len(level.value) for level in Level)
    styles = {Level.OK: "green", Level.WARNING: "yellow", Level.SKIPPED: "cyan", Level.ERROR: "bold red"}
    for line in lines:
        style = styles[line.level]
        display.console.print(
            f"[{style}]{line.level.value:<{level_width}}[/{style}]  {escape(line.check):<{width}}  {escape(line.text)}",
            highlight=False,
            soft_wrap=True,
        )
