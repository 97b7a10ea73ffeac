"""The report as one HTML page."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import Any

from jinja2 import Environment

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.redaction import printable
from draftsmith.artifacts.results.data import LogsSummary, PromptsSummary
from draftsmith.artifacts.results.evaluation import AnswerContext, EvaluationResult
from draftsmith.artifacts.results.gate import LOAD_RULES, GateDecision
from draftsmith.stages.report import tables
from draftsmith.stages.report.metrics import LineageEntry, device_seconds, wall_seconds
from draftsmith.stages.report.plots import (
    acceptance_by_offset,
    gain_by_slice,
    speed_by_load,
    tau_by_slice,
    tau_over_time,
)
from draftsmith.stages.report.review import duration, name_of, review_of
from draftsmith.stages.report.stage import HistoryPoint
from draftsmith.stages.report.tables import Step
from draftsmith.stages.report.template import PAGE, STYLE

_SHOWN = 2  # unfolded contexts of each kind


@dataclass(frozen=True)
class ReportData:
    """The content of a report. Missing parts are skipped or shown as —."""

    title: str
    evaluation: EvaluationResult = field(default_factory=EvaluationResult)
    decision: GateDecision | None = None
    facts: Mapping[str, str] = field(default_factory=dict)  # the line below the title: name -> value
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
        choice=tables.choice_sentence(evaluation) if data.decision is not None else "",
        contexts=_in_order([context for context in data.contexts if context.slice is None]),
        contexts_by_slice=groupby(
            (context for context in data.contexts if context.slice is not None), attrgetter("slice")
        ),
        shown=2 * _SHOWN,
        data=_json({name: {} if summary is None else summary.to_json() for name, summary in summaries.items()})
        if any(summaries.values())
        else "",
        config=_json(data.config) if data.config else "",
        plots=_plots(data),
        single=tables.single_points(evaluation),
        tables={
            "drafters": tables.drafters(review, evaluation),
            "by_slice": tables.by_slice(evaluation),
            "confidence": tables.confidence(evaluation),
            "by_offset": tables.by_offset(evaluation),
            "by_setting": tables.by_setting(evaluation),
            "by_load": tables.by_load(evaluation),
            "gate": tables.gate(review),
            "stages": tables.stages(data.lineage),
        },
    )
    write_text(path, page.strip() + "\n")


def _plots(data: ReportData) -> dict[str, str]:
    plots = {}
    drafters = data.evaluation.drafters
    if offsets := {
        arm: drafter.acceptance_by_offset for arm, drafter in drafters.items() if len(drafter.acceptance_by_offset) > 1
    }:
        plots["by_offset"] = acceptance_by_offset(offsets, {arm: name_of(arm) for arm in offsets})
    if gains := tables.slice_gains(data.evaluation):
        rules = data.decision.rules if data.decision is not None else ()
        allowed = [rule.metrics.get("wanted") for rule in rules if rule.name.startswith("tau of ")]
        plots["by_slice"] = gain_by_slice(gains, allowed[0] if allowed else None)
    elif slices := {name: arms for name, arms in data.evaluation.sets.items() if arms}:
        plots["tau_by_slice"] = tau_by_slice(slices)
    if curves := {arm: curve for arm in drafters if len(curve := data.evaluation.load_curve(arm)) > 1}:
        plots["by_load"] = speed_by_load(curves)
    if len(data.history) > 1:
        plots["trend"] = tau_over_time(data.history)
    return plots


def _cost_sentence(lineage: Sequence[LineageEntry]) -> str:
    """Return the cost of the refresh; empty if its durations are unknown."""
    total = wall_seconds(lineage)
    if not total:
        return ""
    longest, devices = max(lineage, key=lambda entry: entry.manifest.duration_s), device_seconds(lineage)
    on_devices = f" and {duration(devices)} of device time" if devices > total else ""
    return (
        f"The refresh took {duration(total)} ({total:,.0f} s) of stages{on_devices}, with reused ones; the longest "
        f"was {longest.name} with {duration(longest.manifest.duration_s)}."
    )


def _saved_sentence(lineage: Sequence[LineageEntry], decision: GateDecision | None) -> str:
    """Return the challenger's savings at the team's load; empty without a load or savings."""
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
    typical = [context for context in contexts if context.kind == "typical"]
    worst = [context for context in contexts if context.kind != "typical"]
    return [*worst[:_SHOWN], *typical[:_SHOWN], *worst[_SHOWN:], *typical[_SHOWN:]]


def _visible_spaces(piece: str) -> str:
    """Return the text with white space at its edges made visible."""
    return re.sub("^ +|(?<! ) +$", lambda spaces: "␣" * len(spaces[0]), piece.replace("\n", "⏎"))
