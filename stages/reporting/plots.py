"""Inline SVG figures of the report: the same bytes for the same data, readable on a light and on a dark page."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec

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
    """Share of proposals accepted at each position, one line a drafter."""

    figure = _figure(7.2, 3.4)
    axes = figure.add_subplot()
    for arm, shares in drafters.items():
        offsets = range(1, len(shares) + 1)
        axes.plot(offsets, shares, marker="o", markersize=4, color=COLOURS.get(arm, _OTHER), label=names[arm])
    axes.set(xlabel="position in the block", ylabel="share accepted", ylim=(0, 1.02))
    axes.xaxis.set_major_locator(_whole_numbers())
    axes.legend()
    return _svg(figure, "acceptance", "Share of proposals accepted at each position")


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
    axes.set(ylabel="acceptance length")
    axes.tick_params(axis="x", labelrotation=20)
    axes.legend()
    return _svg(figure, "line", "Acceptance length of the line's drafters over time")


@_styled
def tau_over_cost(arms: Mapping[str, Sequence[Mapping[str, Any]]], levels: Mapping[str, float]) -> str:
    """Acceptance length over trained positions and over seconds of training, one line an arm, a bar over its seeds.

    arms: rows with `positions`, `seconds`, `tau` and `tau_of_seeds`, one a budget; levels: dashed lines by name.
    """
    figure = _figure(9.6, 3.8)
    others = iter(_SERIES)
    colours = {arm: COLOURS.get(arm) or next(others) for arm in arms}
    panels = (("positions", "trained block positions, thousands", 1e-3), ("seconds", "seconds of training", 1.0))
    for index, (cost, label, unit) in enumerate(panels):
        axes = figure.add_subplot(1, len(panels), index + 1)
        for arm, rows in arms.items():
            ordered = sorted(rows, key=lambda row: row[cost])
            tau = [row["tau"] for row in ordered]
            # a mean of equal values may lie an ulp beside them, and matplotlib takes no negative bar
            below = [max(0.0, row["tau"] - min(row["tau_of_seeds"])) for row in ordered]
            above = [max(0.0, max(row["tau_of_seeds"]) - row["tau"]) for row in ordered]
            axes.errorbar(
                [unit * row[cost] for row in ordered], tau, yerr=[below, above], marker="o", markersize=4, capsize=2,
                linewidth=1.5, color=colours[arm], label=arm,
            )  # fmt: skip
        for name, level in levels.items():
            axes.axhline(level, linestyle="--", linewidth=1, color=COLOURS["plain"])
            axes.annotate(name, (0.01, level), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
        axes.set(xlabel=label, ylabel="tau" if index == 0 else "", xlim=(0, None))
        if index == 0:
            figure.legend(ncols=6, loc="outside upper center")  # beside the lines of many arms, not on them
    return _svg(figure, "cost", "Acceptance length over trained positions and over seconds of training")


@_styled
def differences(rows: Sequence[Mapping[str, Any]], control: str) -> str:
    """The paired difference of every arm to the control, with its interval and the single seeds."""
    ordered = sorted(rows, key=lambda row: row["difference"])
    figure = _figure(7.2, 1.0 + 0.32 * len(ordered))
    axes = figure.add_subplot()
    for place, row in enumerate(ordered):
        colour = (
            COLOURS["control"] if row["difference_low"] > 0 else COLOURS["opd"] if row["difference_high"] < 0 else ""
        )
        axes.plot([row["difference_low"], row["difference_high"]], [place, place], color=colour or COLOURS["plain"])
        axes.plot(row["difference"], place, "o", color=colour or COLOURS["plain"])
        seeds = row["difference_of_seeds"]
        axes.plot(seeds, [place] * len(seeds), "|", color=_INK, markersize=7)
    axes.axvline(0, linewidth=1, color=_INK)
    axes.set_yticks(range(len(ordered)), [row["arm"] for row in ordered])
    axes.set(
        xlabel=f"tau minus that of {control}; bar: 95 % interval over prompts, strokes: seeds",
        ylim=(-0.6, len(ordered) - 0.4),
    )
    axes.grid(visible=False, axis="y")
    return _svg(figure, "differences", f"Difference of each arm to {control}")


def standalone(svg: str) -> str:
    """An inline figure as a file of its own, on white."""
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" style="background:#fff" ', 1) + "\n"


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
