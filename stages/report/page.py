"""The report as one HTML page, with its plots."""

from __future__ import annotations

import html
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from jinja2 import Environment
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, ScalarFormatter

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.redaction import printable
from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.data import LogsSummary, PromptsSummary
from draftsmith.artifacts.results.evaluation import AnswerContext, EvaluationResult, LoadPoint
from draftsmith.artifacts.results.gate import LOAD_RULES, GateDecision
from draftsmith.stages.evaluation.verdicts import load_factor
from draftsmith.stages.report import presentation
from draftsmith.stages.report.metrics import LineageEntry, device_seconds, wall_seconds
from draftsmith.stages.report.presentation import SliceGain, Step
from draftsmith.stages.report.review import duration, name_of, review_of
from draftsmith.stages.report.stage import HistoryPoint
from draftsmith.stages.report.template import PAGE, STYLE

_SHOWN = 2  # contexts of each kind that are not folded


@dataclass(frozen=True)
class ReportData:
    """The content of a report. Anything missing is left out or shown as —."""

    title: str
    evaluation: EvaluationResult = field(default_factory=EvaluationResult)
    decision: GateDecision | None = None
    facts: Mapping[str, str] = field(default_factory=dict)  # for the line below the title: name -> value
    steps: Sequence[Step] = ()
    history: Sequence[HistoryPoint] = ()
    contexts: Sequence[AnswerContext] = ()  # of the challenger
    prompts: PromptsSummary | None = None
    logs: LogsSummary | None = None
    lineage: Sequence[LineageEntry] = ()
    config: Mapping[str, object] = field(default_factory=dict)  # artifact -> its stage's config


def render_report(path: Path, data: ReportData) -> None:
    """Write the page. The same data gives the same bytes."""

    def shown(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value  # not our HTML

    environment = Environment(autoescape=True, finalize=shown)
    environment.filters["marked"] = _visible_spaces
    evaluation, review = data.evaluation, review_of(data.evaluation, data.decision)
    summaries = {"prompts": data.prompts, "logs": data.logs}
    page = environment.from_string(PAGE).render(
        title=data.title,
        facts=data.facts,
        style=STYLE,
        review=review,
        as_served=evaluation.target_difference is not None,
        measured_loads=evaluation.load_is_measured,
        warnings=[*review.warnings, *_log_warnings(data.logs)],
        cost=_cost_sentence(data.lineage) + _saved_sentence(data.lineage, data.decision),
        steps=data.steps,
        choice=presentation.choice_sentence(evaluation) if data.decision is not None else "",
        contexts=_in_order([each for each in data.contexts if each.slice is None]),
        contexts_by_slice=groupby((each for each in data.contexts if each.slice is not None), attrgetter("slice")),
        shown=2 * _SHOWN,
        data=_json({name: {} if each is None else each.to_json() for name, each in summaries.items()})
        if any(summaries.values())
        else "",
        config=_json(data.config) if data.config else "",
        plots=_plots(data),
        single=presentation.single_points(evaluation),
        tables={
            "drafters": presentation.drafters(review, evaluation),
            "by_slice": presentation.by_slice(evaluation),
            "confidence": presentation.confidence(evaluation),
            "by_offset": presentation.by_offset(evaluation),
            "by_setting": presentation.by_setting(evaluation),
            "by_load": presentation.by_load(evaluation),
            "gate": presentation.gate(review),
            "stages": presentation.stages(data.lineage),
        },
    )
    write_text(path, page.strip() + "\n")


def _plots(data: ReportData) -> dict[str, str]:
    found = {}
    drafters = data.evaluation.drafters
    if offsets := {
        arm: each.acceptance_by_offset for arm, each in drafters.items() if len(each.acceptance_by_offset) > 1
    }:
        found["by_offset"] = acceptance_by_offset(offsets, {arm: name_of(arm) for arm in offsets})
    if gains := presentation.slice_gains(data.evaluation):
        rules = data.decision.rules if data.decision is not None else ()
        allowed = [rule.metrics.get("wanted") for rule in rules if rule.name.startswith("tau of ")]
        found["by_slice"] = gain_by_slice(gains, allowed[0] if allowed else None)
    elif slices := {name: arms for name, arms in data.evaluation.sets.items() if arms}:
        found["tau_by_slice"] = tau_by_slice(slices)
    if curves := {arm: curve for arm in drafters if len(curve := data.evaluation.load_curve(arm)) > 1}:
        found["by_load"] = speed_by_load(curves)
    if len(data.history) > 1:
        found["trend"] = tau_over_time(data.history)
    return found


def _cost_sentence(lineage: Sequence[LineageEntry]) -> str:
    """Return what the refresh took; empty if its durations are unknown."""
    total = wall_seconds(lineage)
    if not total:
        return ""
    longest, devices = max(lineage, key=lambda entry: entry.manifest.duration_s), device_seconds(lineage)
    on_devices = f" and {duration(devices)} of device time" if devices > total else ""
    return (
        f"The refresh took {duration(total)} ({total:,.0f} s) of stages{on_devices}, reused ones included; the longest "
        f"was {longest.name} with {duration(longest.manifest.duration_s)}."
    )


def _saved_sentence(lineage: Sequence[LineageEntry], decision: GateDecision | None) -> str:
    """Return what the challenger saves at the team's load; empty if that was not asked for, or it saves nothing."""
    rule, spent = decision.at_load if decision is not None else None, device_seconds(lineage) / 3600
    factor = (rule.metrics["value"] or 0.0) if rule is not None else 0.0
    if factor <= 1 or not spent:
        return ""
    share = 1 - 1 / factor
    return (
        f" At your load the same tokens take {share:.1%} less device time than "
        f"{'with the champion' if rule and rule.name == LOAD_RULES[0] else 'without a drafter'}: "
        f"{168 * share:.1f} h a week of a device that is always busy. The refresh took {spent:.2g} device hours, which "
        f"{spent / share:.2g} device hours of such traffic pay back."
    )


def _log_warnings(logs: LogsSummary | None) -> list[str]:
    if logs is None:
        return []
    return [
        f"{count} of {logs.scored} logged answers that were checked are improbable: {reason}."
        for reason, count in logs.improbable.items()
        if count
    ]


def _json(shown: Mapping[str, object]) -> str:
    return json.dumps(shown, indent=2, sort_keys=True, ensure_ascii=False, default=str)


def _in_order(contexts: Sequence[AnswerContext]) -> list[AnswerContext]:
    """Return the two worst, two typical ones, then the rest."""
    typical = [each for each in contexts if each.kind == "typical"]
    worst = [each for each in contexts if each.kind != "typical"]
    return [*worst[:_SHOWN], *typical[:_SHOWN], *worst[_SHOWN:], *typical[_SHOWN:]]


def _visible_spaces(piece: str) -> str:
    """Return the text with white space at its edges made visible."""
    return re.sub("^ +|(?<! ) +$", lambda spaces: "␣" * len(spaces[0]), piece.replace("\n", "⏎"))


COLOURS = {  # also for the colour-blind
    "plain": "#8a8f98", "champion": "#a06cd5", "sft": "#4c8bd6", "opd": "#e0703c", "control": "#3fa66b",
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
    """Plot the share of proposals accepted at each position, a line for each drafter."""
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
    """Plot the challenger's gain over the champion on each slice, as a forest plot. allowed: the loss that is."""
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
    """Plot each drafter's acceptance length on every slice with its interval, where there is no champion."""
    arms = list(dict.fromkeys(arm for each in slices.values() for arm in each))
    figure, axes = _axes(0.9 + (0.12 + 0.14 * len(arms)) * len(slices))
    for place, arm in enumerate(arms):
        shift = 0.7 * ((place + 0.5) / len(arms) - 0.5)
        found = [(row + shift, each[arm], tau) for row, each in enumerate(slices.values())
                 if arm in each and (tau := each[arm].tau) is not None]  # fmt: skip
        below = [tau - (tau if own.low is None else own.low) for _, own, tau in found]
        above = [(tau if own.high is None else own.high) - tau for _, own, tau in found]
        axes.errorbar(
            [tau for *_, tau in found], [row for row, *_ in found], xerr=[below, above], linestyle="", marker="o",
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
