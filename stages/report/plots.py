"""Plots of the report, as SVG."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from draftsmith.artifacts.redaction import printable
from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.evaluation import LoadPoint
from draftsmith.stages.evaluation.verdicts import load_factor
from draftsmith.stages.report.review import name_of
from draftsmith.stages.report.stage import HistoryPoint
from draftsmith.stages.report.tables import SliceGain

COLOURS = {  # also for the colour-blind
    "plain": "#8a8f98", "champion": "#a06cd5", "sft": "#4c8bd6", "opd": "#e0703c", "control": "#3fa66b",
    "native": "#b59a2c",
}  # fmt: skip
_OTHER = "#a06cd5"
_MOST_CHARS = 40  # of a slice's name in a plot
_INK = "#010203"  # stands for the page's text colour, and becomes `currentColor`
_STYLE: Any = {
    "svg.hashsalt": "draftsmith",
    "svg.fonttype": "none",
    "font.size": 10,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}
_styled = style.context(_STYLE, after_reset=True)  # whatever the user's matplotlibrc sets


@_styled
def acceptance_by_offset(drafters: Mapping[str, Sequence[float]], names: Mapping[str, str]) -> str:
    """Plot the share of proposals accepted at each position, one line per drafter."""
    figure, axes = _axes(3.4)
    for arm, shares in drafters.items():
        offsets = range(1, len(shares) + 1)
        axes.plot(offsets, shares, marker="o", markersize=4, color=COLOURS.get(arm, _OTHER), label=names[arm])
    axes.set(xlabel="position in the block", ylabel="share accepted", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return _svg(figure, "acceptance", "Share of proposals accepted at each position")


@_styled
def gain_by_slice(gains: Sequence[SliceGain], allowed: float | None) -> str:
    """Plot the challenger's gain over the champion on each slice, as a forest plot. allowed: the allowed loss."""
    figure, axes = _axes(0.9 + 0.26 * len(gains))
    for row, gain in enumerate(gains):
        low, high = gain.ends or (gain.value, gain.value)
        colour = COLOURS["plain"] if gain.problem else COLOURS["opd"] if high < 0 else COLOURS["control"]
        axes.plot([100 * low, 100 * high], [row, row], color=colour, linewidth=2)
        axes.plot(100 * gain.value, row, color=colour, marker="x" if gain.problem else "o", markersize=5)
    axes.axvline(0, color=_INK, linewidth=0.8)
    if allowed is not None:
        axes.axvline(100 * allowed, color=_INK, linewidth=0.8, linestyle="dashed")
    names = [f"{_cut(gain.name)}{' (inconclusive)' * bool(gain.problem)}" for gain in gains]
    axes.set_yticks(range(len(gains)), names, parse_math=False)
    axes.set(xlabel="gain of acceptance length over the champion, %", ylim=(len(gains) - 0.5, -0.5))
    return _svg(figure, "slices", "Gain of the challenger over the champion by slice")


@_styled
def tau_by_slice(slices: Mapping[str, Mapping[str, SetMetrics]]) -> str:
    """Plot each drafter's acceptance length on every slice with its interval, if there is no champion."""
    arms = list(dict.fromkeys(arm for by_arm in slices.values() for arm in by_arm))
    figure, axes = _axes(0.9 + (0.12 + 0.14 * len(arms)) * len(slices))
    for place, arm in enumerate(arms):
        shift = 0.7 * ((place + 0.5) / len(arms) - 0.5)
        points = [(row + shift, by_arm[arm], tau) for row, by_arm in enumerate(slices.values())
                 if arm in by_arm and (tau := by_arm[arm].tau) is not None]  # fmt: skip
        below = [tau - (tau if metrics.low is None else metrics.low) for _, metrics, tau in points]
        above = [(tau if metrics.high is None else metrics.high) - tau for _, metrics, tau in points]
        axes.errorbar(
            [tau for *_, tau in points], [row for row, *_ in points], xerr=[below, above], linestyle="", marker="o",
            markersize=5, elinewidth=2, color=COLOURS.get(arm, _OTHER), label=name_of(arm),
        )  # fmt: skip
    axes.set_yticks(range(len(slices)), [_cut(name) for name in slices], parse_math=False)
    axes.set(xlabel="acceptance length", ylim=(len(slices) - 0.5, -0.5))
    figure.legend(loc="outside upper left", ncols=4)
    return _svg(figure, "slices", "Acceptance length of each drafter by slice")


@_styled
def speed_by_load(curves: Mapping[str, Sequence[LoadPoint]]) -> str:
    """Plot each drafter's speed-up over the number of requests in flight, with its interval as a band."""
    figure, axes = _axes(3.4)
    for arm, points in curves.items():
        colour, numbers = COLOURS.get(arm, _OTHER), [point.concurrency for point in points]
        values, lows, highs = zip(*(load_factor(point) for point in points), strict=True)
        axes.plot(numbers, values, marker="o", markersize=4, color=colour, label=name_of(arm))
        if None not in lows:
            axes.fill_between(numbers, lows, highs, color=colour, alpha=0.15, linewidth=0)
    axes.axhline(1, color=COLOURS["plain"], linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="requests in flight", ylabel="speed-up")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.legend()
    return _svg(figure, "load", "Speed-up by requests in flight")


def _cut(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _MOST_CHARS else f"{name[: _MOST_CHARS - 1]}…"


@_styled
def tau_over_time(history: Sequence[HistoryPoint]) -> str:
    """Plot acceptance lengths of a line's drafters: at promotions (with the version), drift checks and refusals."""
    figure, axes = _axes(3.1)
    for what, marker, colour, label in (
        ("promoted", "D", COLOURS["opd"], "at its promotion"),
        ("checked", "o", COLOURS["sft"], "at a drift check"),
        ("refused", "x", COLOURS["plain"], "not promoted"),
        ("now", "s", COLOURS["control"], "this refresh"),
    ):
        points = [(point, point.tau) for point in history if point.what == what and point.tau is not None]
        if not points:
            continue
        times: list[Any] = [datetime.fromisoformat(point.at) for point, _ in points]
        below = [tau - (tau if point.low is None else min(tau, point.low)) for point, tau in points]
        above = [(tau if point.high is None else max(tau, point.high)) - tau for point, tau in points]
        axes.errorbar(
            times, [tau for _, tau in points], yerr=[below, above], linestyle="", marker=marker, markersize=5,
            capsize=2, color=colour, label=label,
        )  # fmt: skip
        if what == "promoted":
            for time, (point, tau) in zip(times, points, strict=True):
                axes.annotate(f" {point.version}", (time, tau), xytext=(4, 4), textcoords="offset points", fontsize=8)
    axes.set(ylabel="acceptance length")
    axes.tick_params(axis="x", labelrotation=20)
    axes.legend()
    return _svg(figure, "line", "Acceptance length of the line's drafters over time")


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(7.2, height), layout="constrained")
    return figure, figure.add_subplot()


def _svg(figure: Figure, name: str, title: str) -> str:
    """Return the figure as an element of a page: no background, the page's colour and font, unique ids, no links."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", svg)
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", svg).replace("xlink:href", "href")
    svg = re.sub(r"font: ([\d.]+px)[^;\"]*", r"font-size: \1", svg).replace(_INK, "currentColor")
    label = html.escape(title, quote=True)
    return re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", rf'<svg \1 role="img" aria-label="{label}">', svg, count=1)
