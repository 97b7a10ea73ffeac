"""Prints to the terminal: the plan, progress with rate and time left, lines, tables, durations and sizes."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich import markup
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.redaction import printable
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.planning.plan import Build, EarlyEnd, Status

MAX_CHARS = 60


def format_duration(seconds: float) -> str:
    """Return `8 s`, `2 min 05 s` or `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_bytes(count: float) -> str:
    """Return a number of bytes as `812 B` or `3.4 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def shorten(value: object, max_chars: int = MAX_CHARS) -> str:
    """Return a string as it is, any other value as JSON, cut to `max_chars`."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Return the fields of a nested value by dotted path. An empty mapping or list counts as a value."""
    if isinstance(value, Mapping) and (value or not prefix):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    fields: dict[str, object] = {}
    for name, item in items:
        fields |= flatten(item, f"{prefix}.{name}" if prefix else str(name))
    return fields


_LINE_EVERY_S = 10.0  # without a terminal: in a log file, in CI
_RATE_WINDOW_S = 300.0  # over which the rate is averaged; a training step may take a minute
_PLAIN_WIDTH = 160
_STATUS_STYLE = {
    Status.HIT: "green",
    Status.RUN: "cyan",
    Status.RESUME: "yellow",
    Status.FORCED: "magenta",
    Status.AFTER: "dim",
    Status.DAMAGED: "red",
}


@dataclass(frozen=True)
class EndedRun:
    """A run that has ended and the command that started it, for the screen of its results."""

    config: RunOptions
    file: str  # path of the config as typed
    overrides: Sequence[str]  # values of `--set`
    mlflow: str  # the command that shows the runs, or the server's URL
    seconds: float
    outcome: str | None = None  # name of its conclusion
    refused: DraftsmithError | None = None  # why nothing was promoted, or the champion is not served


class StageDisplay:
    """Shows the progress and the log of one running stage."""

    def __init__(self, display: Display, name: str, bar: Progress) -> None:
        """Show it in `bar`, which also knows rate and time left; without a terminal it is not shown."""
        self._display, self._name, self._bar = display, name, bar
        self._task = bar.add_task(name, total=None, text="starting")
        self._unit, self._done = "", 0
        self._last_line = time.monotonic()

    def progress(self, done: int, total: int, unit: str, metrics: Mapping[str, float]) -> float | None:
        """Show the progress: on a terminal at once, otherwise as a line now and then. Return the seconds left."""
        if unit != self._unit or done < self._done:  # other work, of unknown rate
            self._bar.reset(self._task, total=total)
        self._unit, self._done = unit, done
        self._bar.update(self._task, completed=done, total=total)
        task = self._bar.tasks[0]
        left = task.time_remaining if done < total else None
        parts = [f"{done}/{total} {unit}"]
        if task.speed:
            parts.append(f"{format_number(task.speed)} {unit}/s")
        if left is not None:
            parts.append(f"{format_duration(left)} left")
        parts += [f"{name}={format_number(value)}" for name, value in metrics.items()]
        text = "  ".join(parts)
        self._bar.update(self._task, text=escape(text))
        if not self._display.console.is_terminal and time.monotonic() - self._last_line >= _LINE_EVERY_S:
            self._last_line = time.monotonic()
            self._display.line(f"{self._name}: {text}")
        return left

    def log(self, message: str) -> None:
        """Print a line of the stage."""
        self._display.line(f"{self._name}: {message}")


class Display:
    """Prints everything of a run. Progress is a bar on a terminal, otherwise a line now and then."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        if not self.console.is_terminal and console is None:
            self.console = Console(width=_PLAIN_WIDTH)

    def line(self, text: str) -> None:
        """Print a line of text, which may come from outside."""
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def lines(self, texts: Iterable[str]) -> None:
        """Print several lines."""
        for text in texts:
            self.line(text)

    def plan(self, planned: Sequence[Build], end: EarlyEnd | None = None) -> None:
        """Print a plan as a table. Nodes after an early end form a second table, or a line if that end is certain."""
        names = [item.node.name for item in planned]
        until = names.index(end.after) + 1 if end is not None else len(names)
        self._plan("Plan", planned[:until])
        if end is not None and end.certain:
            self.line(f"{end.what}: {', '.join(names[until:])}")
        elif end is not None:
            self._plan(f"{end.what}:", planned[until:])

    def _plan(self, title: str, planned: Sequence[Build]) -> None:
        table = Table(title=title, title_justify="left", box=None, pad_edge=False)
        for column in ("node", "stage", "key", "what happens"):
            table.add_column(column, no_wrap=column != "what happens")
        for item in planned:
            style = _STATUS_STYLE[item.status]
            action = f"after {', '.join(item.after)}" if item.status is Status.AFTER else item.status.value
            key = item.key[:16] if item.key else "-"
            table.add_row(item.node.name, item.node.stage.name, key, f"[{style}]{action}[/{style}]")
        self.console.print(table)

    def newer_files(self, planned: Sequence[Build]) -> None:
        """Print which nodes of a plan reuse a listing of files that omits newer ones."""
        self.lines(filter(None, [item.newer_files_notice for item in planned]))

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[StageDisplay]:
        """Show a stage while the block runs."""
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
        bar = Progress(
            *columns,
            console=self.console,
            transient=True,
            get_time=time.monotonic,
            speed_estimate_period=_RATE_WINDOW_S,
        )
        if not self.console.is_terminal:
            self.line(f"{name}: started")
        with bar if self.console.is_terminal else contextlib.nullcontext():
            yield StageDisplay(self, name, bar)

    def finished(self, name: str, seconds: float, summary: Mapping[str, float]) -> None:
        """Print that a node was made, with its metrics."""
        metrics = "  ".join(f"{key}={format_number(value)}" for key, value in summary.items())
        self.line(f"{name}: done in {format_duration(seconds)}" + (f"  {metrics}" if metrics else ""))

    def reused(self, name: str) -> None:
        """Print that a node was reused."""
        self.line(f"{name}: reused")

    def table(
        self,
        head: Sequence[str],
        rows: Sequence[Sequence[str]],
        *,
        title: str = "",
        caption: str = "",
        text_columns: int = 1,
    ) -> None:
        """Print a table, with words in the first `text_columns` columns and numbers in the others.

        head: the headings. A line break in a cell becomes a space.
        """
        table = Table(title=escape(title) or None, title_justify="left", box=None, pad_edge=False)
        for index, heading in enumerate(head):
            justify: Literal["left", "right"] = "left" if index < text_columns else "right"
            table.add_column(escape(heading), justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*(escape(cell.replace("\n", " ")) for cell in row))
        self.console.print(table)
        if caption:
            self.line(caption)


def escape(text: str) -> str:
    """Return untrusted text in which neither markup nor control characters take effect."""
    return markup.escape(printable(text))


def format_number(value: float) -> str:
    """Return a number with four significant digits, or all digits from 1000 on."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def folded_table(*columns: str) -> Table:
    """Return a table whose long cells are wrapped and never cut, so that paths stay complete."""
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
