"""Results of checks, one line each. `draftsmith check` prints all of them, a run stops at its first error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from draftsmith.artifacts.errors import DraftsmithError, RetryableError, from_os_error
from draftsmith.flows.execution.display import Display, escape


class Level(StrEnum):
    OK = "ok"
    WARNING = "warning"  # works, but less well than it could
    SKIPPED = "not checked"  # could not be checked here, for the reason that the line gives
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """One line: how bad, which check, what was found and what to do."""

    level: Level
    check: str
    text: str
    unreachable: bool = False  # skipped because the hub, a bucket or a server of ours could not be reached


@dataclass
class Findings:
    """Collects what the checks find. An error of one check never keeps the others from running."""

    lines: list[Finding] = field(default_factory=list)

    def ok(self, check: str, text: str) -> None:
        self.lines.append(Finding(Level.OK, check, text))

    def warn(self, check: str, text: str) -> None:
        self.lines.append(Finding(Level.WARNING, check, text))

    def skip(self, check: str, text: str, *, unreachable: bool = False) -> None:
        """Record what could not be checked here, and why. unreachable: a later try may find more."""
        self._add(Finding(Level.SKIPPED, check, text, unreachable))

    def error(self, check: str, text: str) -> None:
        self._add(Finding(Level.ERROR, check, text))

    def _add(self, found: Finding) -> None:
        """Add a line once: a plan that cannot be made meets the errors of single checks before them."""
        if not any(line == found or line.text.endswith(f": {found.text}") for line in self.lines):
            self.lines.append(found)

    @contextmanager
    def part(self, check: str) -> Iterator[None]:
        """Make a finding of whatever the block raises, so that the other checks go on."""
        try:
            yield
        except RetryableError as error:
            self.skip(check, str(error), unreachable=True)
        except DraftsmithError as error:
            self.error(check, " ".join(str(error).split()))
        except OSError as error:
            self.error(check, str(from_os_error(error, "reading")))
        except Exception as error:  # a defect of the check, or of a library that it asks: the others are still worth it
            self.error(check, f"unexpected {type(error).__name__}: {' '.join(str(error).split())}")

    @property
    def errors(self) -> int:
        return self._count(Level.ERROR)

    @property
    def unreachable(self) -> list[str]:
        """The checks that something unreachable kept from being made."""
        return list(dict.fromkeys(line.check for line in self.lines if line.unreachable))

    @property
    def summary(self) -> str:
        """One line that counts errors, warnings and what was not checked."""
        counts = [(self.errors, "error"), (self._count(Level.WARNING), "warning")]
        named = [f"{count} {name}{'' if count == 1 else 's'}" for count, name in counts]
        return f"{', '.join(named)}, {self._count(Level.SKIPPED)} not checked"

    @property
    def remarks(self) -> list[str]:
        """Warnings and what was not checked, as a run prints them."""
        shown = (Level.WARNING, Level.SKIPPED)
        return [f"{line.level.value}: {line.check}: {line.text}" for line in self.lines if line.level in shown]

    def _count(self, level: Level) -> int:
        return sum(line.level is level for line in self.lines)


class FirstError(Findings):
    """Raises the first error, as a run wants it: as the exception that it is where there is one."""

    def error(self, check: str, text: str) -> None:
        raise DraftsmithError(f"{check}: {text}")

    @contextmanager
    def part(self, check: str) -> Iterator[None]:
        try:
            yield
        except DraftsmithError as error:  # its kind says whether a retry is worth it
            if str(error).startswith(f"{check}: "):
                raise
            raise type(error)(f"{check}: {error}") from error


def show(display: Display, lines: list[Finding]) -> None:
    """Print one line a check."""
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
