"""What checks found: one line each. `draftsmith check` prints all of them, a run stops at its first error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum

from draftsmith.artifacts.errors import DraftsmithError, from_os_error
from draftsmith.flows.pipeline.display import Display, escape


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
    """What was found so far: an error of one check never keeps the others from running."""

    lines: list[Finding] = field(default_factory=list)

    def ok(self, check: str, text: str) -> None:
        self.lines.append(Finding(Level.OK, check, text))

    def warn(self, check: str, text: str) -> None:
        self.lines.append(Finding(Level.WARNING, check, text))

    def error(self, check: str, text: str) -> None:
        """Told once: a plan that cannot be made meets the errors of single checks before them."""
        found = Finding(Level.ERROR, check, text)
        if not any(line == found or line.text.endswith(f": {text}") for line in self.lines):
            self.lines.append(found)

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

    @property
    def warnings(self) -> list[str]:
        return [f"{line.check}: {line.text}" for line in self.lines if line.level is Level.WARNING]


class FirstError(Findings):
    """What a run checks with: the first error ends it, as the exception that it is where there is one."""

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
    """One line a check."""
    width = max(len(line.check) for line in lines)
    for line in lines:
        style = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "bold red"}[line.level]
        display.console.print(
            f"[{style}]{line.level.value:<7}[/{style}]  {escape(line.check):<{width}}  {escape(line.text)}",
            highlight=False,
            soft_wrap=True,
        )
