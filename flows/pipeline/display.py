"""What a person sees in the terminal: the plan, progress with rate and time left, and the results."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.table import Table

from draftsmith.flows.pipeline.graph import PlannedNode, Status
from draftsmith.stages.reporting.page import findings

_LINE_EVERY_S = 10.0  # where nobody watches a moving bar: a log file, CI
_RATE_WINDOW_S = 30.0
_PLAIN_WIDTH = 160
_STATUS_STYLE = {
    Status.HIT: "green",
    Status.RUN: "cyan",
    Status.RESUME: "yellow",
    Status.FORCED: "magenta",
    Status.AFTER: "dim",
}


class Rate:
    """Work done a second over the last half minute, and from it the time left."""

    def __init__(self) -> None:
        self._points: deque[tuple[float, int]] = deque()
        self._kind: tuple[int, str] | None = None

    def update(self, done: int, total: int, unit: str, now: float) -> tuple[float | None, float | None]:
        """(units a second, seconds left), None while unknown. A new total, unit or start begins anew."""
        if self._kind != (total, unit) or (self._points and done < self._points[-1][1]):
            self._points.clear()
            self._kind = (total, unit)
        self._points.append((now, done))
        while len(self._points) > 2 and now - self._points[0][0] > _RATE_WINDOW_S:
            self._points.popleft()
        (first_time, first_done) = self._points[0]
        if now <= first_time or done <= first_done:
            return None, None
        rate = (done - first_done) / (now - first_time)
        return rate, (total - done) / rate


class StageDisplay:
    """One stage while it runs."""

    def __init__(self, display: Display, name: str, bar: Progress | None) -> None:
        self._display = display
        self._name = name
        self._bar = bar
        self._task: TaskID | None = bar.add_task(name, total=None, text="starting") if bar else None
        self._rate = Rate()
        self._last_line = time.monotonic()

    def progress(self, done: int, total: int, unit: str, figures: Mapping[str, float]) -> None:
        now = time.monotonic()
        rate, left = self._rate.update(done, total, unit, now)
        parts = [f"{done}/{total} {unit}"]
        if rate is not None:
            parts.append(f"{_number(rate)} {unit}/s")
        if left is not None and done < total:
            parts.append(f"{duration(left)} left")
        parts += [f"{name}={_number(value)}" for name, value in figures.items()]
        text = "  ".join(parts)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, total=total, text=escape(text))
        elif now - self._last_line >= _LINE_EVERY_S:
            self._last_line = now
            self._display.line(f"{self._name}: {text}")

    def log(self, message: str) -> None:
        self._display.line(f"{self._name}: {message}")


class Display:
    """Everything that a run prints. On a terminal a moving bar, elsewhere a plain line now and then."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console()
        if not self.console.is_terminal and console is None:
            self.console = Console(width=_PLAIN_WIDTH)

    def line(self, text: str) -> None:
        self.console.print(escape(text), highlight=False, soft_wrap=True)

    def plan(self, planned: Sequence[PlannedNode]) -> None:
        table = Table(title="Plan", title_justify="left", box=None, pad_edge=False)
        for column in ("node", "stage", "key", "what happens"):
            table.add_column(column, no_wrap=column != "what happens")
        for item in planned:
            style = _STATUS_STYLE[item.status]
            what = f"after {', '.join(item.after)}" if item.status is Status.AFTER else item.status.value
            key = item.key[:16] if item.key else "-"
            table.add_row(item.node.name, item.node.stage.name, key, f"[{style}]{what}[/{style}]")
        self.console.print(table)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[StageDisplay]:
        """Show a stage while the block runs."""
        if not self.console.is_terminal:
            self.line(f"{name}: started")
            yield StageDisplay(self, name, None)
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
        with Progress(*columns, console=self.console, transient=True) as bar:
            yield StageDisplay(self, name, bar)

    def finished(self, name: str, seconds: float, summary: Mapping[str, float]) -> None:
        figures = "  ".join(f"{key}={_number(value)}" for key, value in summary.items())
        self.line(f"{name}: done in {duration(seconds)}" + (f"  {figures}" if figures else ""))

    def reused(self, name: str) -> None:
        self.line(f"{name}: reused")

    def results(self, artifacts: Mapping[str, Path], mlflow: str) -> None:
        """The table of the evaluation, if there is one, and where to look next.

        `artifacts`: node -> folder; `mlflow`: the command that shows the runs, or a server's URL.
        """
        evaluation = artifacts.get("evaluation", Path()) / "evaluation.json"
        if "evaluation" in artifacts and evaluation.is_file():
            self._evaluation(json.loads(evaluation.read_text("utf-8")))
        self.line("")
        self.line("Where to look next")
        if "report" in artifacts:
            self.line(f"  report:   {artifacts['report'] / 'report.html'}")
        for name in ("sft", "opd", "control"):
            if name in artifacts:
                checkpoint = artifacts[name] / "drafter"
                self.line(f"  drafter:  {checkpoint if checkpoint.is_dir() else artifacts[name]}  ({name})")
        self.line(f"  MLflow:   {mlflow}")

    def _evaluation(self, evaluation: Mapping[str, Any]) -> None:
        self.console.print(results_table(evaluation))
        if shows_settings(evaluation):
            self.console.print(settings_table(evaluation))
        for line in [*exactness_lines(evaluation), *findings(evaluation)]:
            self.line(line)


def results_table(evaluation: Mapping[str, Any]) -> Table:
    """The drafters beside plain decoding, from the content of `evaluation.json`; intervals are of 95 %."""
    table = Table(
        title="Held-out prompts",
        title_justify="left",
        box=None,
        pad_edge=False,
        caption=f"tau: {escape(str(evaluation.get('definition_of_tau', '')))}",
        caption_justify="left",
    )
    table.add_column("decoding")
    for column in (
        "tau [95 %]",
        "tau - sft [95 %]",
        "tokens/s",
        "speed-up [95 %]",
        "block",
        "draft/verify",
        "identical",
    ):
        table.add_column(column, justify="right")
    drafters, speed = evaluation.get("drafters", {}), evaluation.get("speed", {})
    for name in [*(name for name in speed if name not in drafters), *drafters]:
        tau, fast = drafters.get(name, {}), speed.get(name, {})
        table.add_row(
            name,
            _with_interval(tau, "tau", "tau_low", "tau_high", "{:.3f}"),
            "-" if name == "sft" else _with_interval(tau, "diff_to_sft", "diff_low", "diff_high", "{:+.3f}"),
            _cell(fast.get("tokens_per_s"), "{:.1f}"),
            _with_interval(fast, "speedup", "speedup_low", "speedup_high", "{:.2f}"),
            _cell(fast.get("block_size", tau.get("block_size")), "{:g}"),
            _shares(fast),
            _cell(fast.get("identical_share"), "{:.1%}"),
        )
    return table


def shows_settings(evaluation: Mapping[str, Any]) -> bool:
    """Is there more to say of speed than the first table holds: several settings, or latencies of a server?"""
    settings = evaluation.get("speed_by_setting") or []
    return len(settings) > 1 or any("first_token_s_median" in arm for s in settings for arm in s["arms"].values())


def settings_table(evaluation: Mapping[str, Any]) -> Table:
    """Speed of every arm at every temperature and concurrency."""
    title = f"Speed on {escape(str(evaluation.get('engine')))}"
    table = Table(title=title, title_justify="left", box=None, pad_edge=False)
    for column in ("temperature", "in flight", "decoding"):
        table.add_column(column)
    for column in (
        "tokens/s",
        "speed-up [95 %]",
        "tau served",
        "tokens/s a request",
        "first token s (p95)",
        "identical",
    ):
        table.add_column(column, justify="right")
    for setting in evaluation["speed_by_setting"]:
        for name, fast in setting["arms"].items():
            first, late = (_cell(fast.get(f"first_token_s_{what}"), "{:.3f}") for what in ("median", "p95"))
            table.add_row(
                f"{setting['temperature']:g}",
                str(setting["concurrency"]),
                name,
                _cell(fast.get("tokens_per_s"), "{:.1f}"),
                _with_interval(fast, "speedup", "speedup_low", "speedup_high", "{:.2f}"),
                _cell(fast.get("tau_served"), "{:.2f}"),
                _cell(fast.get("request_tokens_per_s_median"), "{:.1f}"),
                f"{first} ({late})",
                _cell(fast.get("identical_share"), "{:.1%}"),
            )
    return table


def exactness_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """What was found about the outputs being the target's own, one sentence a line."""
    exact = evaluation.get("exactness", {})
    lines = []
    if exact.get("fp32_prompts"):
        lines.append(
            f"Exactness in fp32: {exact['fp32_identical']} of {exact['fp32_prompts']} outputs identical to plain "
            "decoding, token for token."
        )
    share, margin = exact.get("identical_share"), exact.get("median_margin")
    if _is_number(share):
        behind = f"; median logit margin at the first difference {_number(margin)}" if _is_number(margin) else ""
        lines.append(f"In the serving dtype ({exact.get('serving_dtype')}): {share:.1%} identical{behind}.")
    for arm, figures in (evaluation.get("parity") or {}).items():
        if "served_steps" in figures:
            what = f"{figures['different_steps']} of {figures['served_steps']} served verify steps differ from replay"
        else:
            what = f"tau {figures['served_tau']:.3f} as served, {figures['replayed_tau']:.3f} in replay"
        lines.append(f"Parity of {arm}: {what}.")
    return lines


def _shares(fast: Mapping[str, Any]) -> str:
    draft, verify = fast.get("draft_share"), fast.get("verify_share")
    return f"{draft:.0%}/{verify:.0%}" if _is_number(draft) and _is_number(verify) else "-"


def _with_interval(row: Mapping[str, Any], value: str, low: str, high: str, form: str) -> str:
    text = _cell(row.get(value), form)
    if _is_number(row.get(low)) and _is_number(row.get(high)):
        text += f" \\[{form.format(row[low])}, {form.format(row[high])}]"
    return text


def _cell(value: Any, form: str) -> str:
    return form.format(value) if _is_number(value) else "-"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """`8 s`, `2 min 05 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
