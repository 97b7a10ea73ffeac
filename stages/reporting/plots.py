"""Inline SVG figures of the report: the same bytes for the same data, readable on a light and on a dark page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

from draftsmith.artifacts.printable import printable

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.ticker import Locator

COLOURS = {  # also for the colour-blind
    "plain": "#8a8f98", "champion": "#a06cd5", "sft": "#4c8bd6", "opd": "#e0703c", "control": "#3fa66b",
}  # fmt: skip
_OTHER = "#a06cd5"
_SERIES = (COLOURS["control"], _OTHER, "#c9a227", "#3aa6b9", "#8c564b", *[COLOURS["plain"]] * 99)  # of further arms
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
_LABEL = 28  # characters
CURVE_POINTS = 300  # longer curves are shown as means over neighbouring steps
P = ParamSpec("P")


def _styled(draw: Callable[P, str]) -> Callable[P, str]:
    """Draw in our own style, whatever the user's matplotlibrc says."""

    @wraps(draw)
    def styled(*args: P.args, **kwargs: P.kwargs) -> str:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            matplotlib.rcParams.update(_STYLE)
            return draw(*args, **kwargs)

    return styled


@_styled
def acceptance_by_offset(drafters: Mapping[str, Sequence[float]], names: Mapping[str, str]) -> str:
    """Share of proposals accepted at each offset, one line a drafter."""

    figure = _figure(7.2, 3.4)
    axes = figure.add_subplot()
    for arm, shares in drafters.items():
        offsets = range(1, len(shares) + 1)
        axes.plot(offsets, shares, marker="o", markersize=4, color=COLOURS.get(arm, _OTHER), label=names[arm])
    axes.set(xlabel="offset of the proposal", ylabel="share accepted", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.legend()
    return _svg(figure, "acceptance", "Share of proposals accepted at each offset")


@_styled
def accepted_lengths(drafters: Mapping[str, Sequence[float]], names: Mapping[str, str]) -> str:
    """Histogram of accepted lengths (proposals kept in a verify step), one bar a drafter and length."""

    figure = _figure(7.2, 3.4)
    axes = figure.add_subplot()
    width = 0.8 / max(len(drafters), 1)
    for index, (arm, counts) in enumerate(drafters.items()):
        total = sum(counts) or 1
        centres = [length - 0.4 + width * (index + 0.5) for length in range(len(counts))]
        shares = [count / total for count in counts]
        axes.bar(centres, shares, width, color=COLOURS.get(arm, _OTHER), label=names[arm])
    axes.set(xlabel="proposals accepted in a verify step", ylabel="share of verify steps")
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.grid(visible=False, axis="x")
    axes.legend()
    return _svg(figure, "lengths", "Histogram of accepted lengths")


@_styled
def training_curves(curves: Mapping[str, Sequence[tuple[int, float]]], names: Mapping[str, str]) -> str:
    """Loss over steps, one panel a training: their losses are not comparable with each other."""
    figure = _figure(3.5 * len(curves), 3.1)
    for index, (arm, points) in enumerate(curves.items()):
        axes = figure.add_subplot(1, len(curves), index + 1)
        steps, losses = zip(*_thinned(points), strict=True)
        axes.plot(steps, losses, color=COLOURS.get(arm, _OTHER), linewidth=1.5)
        axes.set(title=names[arm], xlabel="step", ylabel="loss" if index == 0 else "")
    return _svg(figure, "curves", "Training loss over steps")


@_styled
def staleness(points: Sequence[tuple[int, float]]) -> str:
    """Share over steps."""
    figure = _figure(7.2, 2.4)
    axes = figure.add_subplot()
    steps, shares = zip(*_thinned(points), strict=True)
    axes.plot(steps, shares, color=COLOURS["opd"], linewidth=1.5)
    axes.set(xlabel="step", ylabel="share off the trace", ylim=(0, 1.02))
    return _svg(figure, "staleness", "Share of trained anchors that the mined trace does not have, over steps")


@_styled
def tau_by_set(sets: Mapping[str, Mapping[str, Mapping[str, Any]]], names: Mapping[str, str]) -> str:
    """tau of every drafter within each prompt set. sets: set -> arm -> `tau`, `low`, `high`."""
    figure = _figure(7.2, 1.1 + 0.16 * len(names) * len(sets) + 0.1 * len(sets))
    axes = figure.add_subplot()
    others = iter(_SERIES)
    for index, (arm, name) in enumerate(names.items()):
        colour = COLOURS.get(arm) or next(others)
        shift = 0.7 * ((index + 0.5) / len(names) - 0.5)
        for place, figures in enumerate(each.get(arm) for each in sets.values()):
            if figures is None or figures.get("tau") is None:
                continue
            ends = [figures["tau"] if figures.get(end) is None else figures[end] for end in ("low", "high")]
            axes.plot(ends, [place + shift] * 2, color=colour, linewidth=1.5)
            axes.plot(figures["tau"], place + shift, "o", markersize=4.5, color=colour)
        axes.plot([], [], "o-", markersize=4.5, color=colour, label=name)
    axes.set_yticks(range(len(sets)), [_label(name) for name in sets])
    axes.invert_yaxis()
    axes.set(xlabel="tau (+1)")
    axes.grid(visible=False, axis="y")
    figure.legend(ncols=4, loc="outside upper center")  # of the figure: long names of sets leave the axes too narrow
    return _svg(figure, "sets", "Acceptance length by prompt set")


@_styled
def time_split(shares: Mapping[str, tuple[float, float]], names: Mapping[str, str]) -> str:
    """Shares of wall time spent on drafting and on verifying; what is missing to 1 is everything else."""
    figure = _figure(7.2, 0.9 + 0.45 * len(shares))
    axes = figure.add_subplot()
    labels = [names[arm] for arm in shares]
    drafts, verifies = [draft for draft, _ in shares.values()], [verify for _, verify in shares.values()]
    others = [max(0.0, 1 - draft - verify) for draft, verify in shares.values()]
    left = [0.0] * len(labels)
    for label, widths, colour in (
        ("draft", drafts, COLOURS["opd"]),
        ("verify", verifies, COLOURS["sft"]),
        ("other", others, COLOURS["plain"]),
    ):
        bars = axes.barh(labels, widths, left=left, height=0.6, color=colour, label=label)
        shown = [f"{width:.0%}" if width > 0.04 else "" for width in widths]
        axes.bar_label(bars, shown, label_type="center", color="white")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set(xlim=(0, 1), xlabel="share of wall time")
    axes.invert_yaxis()
    axes.grid(visible=False)
    axes.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1.0))
    return _svg(figure, "time", "Time spent on drafting and verifying")


@_styled
def tau_over_time(history: Sequence[Mapping[str, Any]]) -> str:
    """What a line's drafters were worth: at each promotion (its version beside it), each drift check and each refusal.

    history: `at` (ISO 8601), `what` (promoted, checked, refused, now: the challenger of this refresh), `version`,
    `tau`, `low`, `high`.
    """
    from datetime import datetime

    figure = _figure(7.2, 3.1)
    axes = figure.add_subplot()
    for what, marker, colour, label in (
        ("promoted", "D", COLOURS["opd"], "at its promotion"),
        ("checked", "o", COLOURS["sft"], "at a drift check"),
        ("refused", "x", COLOURS["plain"], "not promoted"),
        ("now", "s", COLOURS["control"], "this refresh"),
    ):
        points = [point for point in history if point["what"] == what and point.get("tau") is not None]
        if not points:
            continue
        times: list[Any] = [datetime.fromisoformat(point["at"]) for point in points]
        tau = [point["tau"] for point in points]
        below = [t - (t if p.get("low") is None else min(t, p["low"])) for t, p in zip(tau, points, strict=True)]
        above = [(t if p.get("high") is None else max(t, p["high"])) - t for t, p in zip(tau, points, strict=True)]
        axes.errorbar(
            times, tau, yerr=[below, above], linestyle="", marker=marker, markersize=5, capsize=2, color=colour,
            label=label,
        )  # fmt: skip
        if what == "promoted":
            for time, point in zip(times, points, strict=True):
                axes.annotate(
                    f" {point['version']}", (time, point["tau"]), xytext=(4, 4), textcoords="offset points", fontsize=8
                )
    axes.set(ylabel="tau (+1)")
    axes.tick_params(axis="x", labelrotation=20)
    axes.legend()
    return _svg(figure, "line", "Acceptance length of the line's drafters over time")


def _thinned(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most `CURVE_POINTS` means over neighbouring points."""
    size = -(-len(points) // CURVE_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(s for s, _ in group) / len(group), sum(v for _, v in group) / len(group)) for group in groups]


def _label(name: str) -> str:
    """A name that anyone gave: no control character, no formula, and not longer than a label may be."""
    shown = printable(name).replace("$", r"\$").replace("\n", " ")
    return shown if len(shown) <= _LABEL else f"{shown[: _LABEL - 1]}…"


def _whole_numbers() -> Locator:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure, name: str, title: str) -> str:
    """The figure as an element of a page: no background, the page's colour and font, ids of its own, no links."""
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
