"""Inline SVG plots of the report: the same bytes for the same data, readable on a light and on a dark page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any, ParamSpec

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from draftsmith.stages.report.stage import HistoryPoint

COLOURS = {  # also for the colour-blind
    "plain": "#8a8f98", "champion": "#a06cd5", "sft": "#4c8bd6", "opd": "#e0703c", "control": "#3fa66b",
}  # fmt: skip
_OTHER = "#a06cd5"
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
P = ParamSpec("P")


def _styled(draw: Callable[P, str]) -> Callable[P, str]:
    """Draw in the report's style, whatever the user's matplotlibrc sets."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> str:
        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            return draw(*args, **kwargs)

    return styled


@_styled
def acceptance_by_offset(drafters: Mapping[str, Sequence[float]], names: Mapping[str, str]) -> str:
    """Plot the share of proposals accepted at each position, a line for each drafter."""
    figure = _figure(7.2, 3.4)
    axes = figure.add_subplot()
    for arm, shares in drafters.items():
        offsets = range(1, len(shares) + 1)
        axes.plot(offsets, shares, marker="o", markersize=4, color=COLOURS.get(arm, _OTHER), label=names[arm])
    axes.set(xlabel="position in the block", ylabel="share accepted", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return _svg(figure, "acceptance", "Share of proposals accepted at each position")


@_styled
def tau_over_time(history: Sequence[HistoryPoint]) -> str:
    """Plot acceptance lengths of a line's drafters: at promotions (with the version), drift checks and refusals."""
    figure = _figure(7.2, 3.1)
    axes = figure.add_subplot()
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


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


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
