"""The report of a refresh: one HTML file with everything inside, readable without a network. The verdict is first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.redaction import printable
from draftsmith.artifacts.results.data import LogsSummary, PromptsSummary
from draftsmith.artifacts.results.evaluation import AnswerContext, EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.stages.report import plots, tables
from draftsmith.stages.report.lineage import LineageEntry, wall_seconds
from draftsmith.stages.report.names import duration, name_of
from draftsmith.stages.report.next_steps import Step
from draftsmith.stages.report.review import review_of
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
        warnings=[*(review.warnings if review else ()), *_log_warnings(data.logs)],
        cost=_cost_sentence(data.lineage),
        steps=data.steps,
        choice=tables.choice_sentence(evaluation) if data.decision is not None else "",
        contexts=_in_order(data.contexts),
        shown=2 * _SHOWN,
        data=_json({name: {} if each is None else each.to_json() for name, each in summaries.items()})
        if any(summaries.values())
        else "",
        config=_json(data.config) if data.config else "",
        plots=_plots(data),
        tables={
            "drafters": tables.drafters(review, evaluation) if review else None,
            "by_set": tables.by_set(evaluation) if review else None,
            "by_setting": tables.by_setting(evaluation),
            "gate": tables.gate(review) if review else None,
            "stages": tables.stages(data.lineage),
        },
    )
    write_text(path, page.strip() + "\n")


def _plots(data: ReportData) -> dict[str, str]:
    found = {}
    drafters = data.evaluation.drafters
    if offsets := {arm: each.acceptance_by_offset for arm, each in drafters.items() if each.acceptance_by_offset}:
        found["by_offset"] = plots.acceptance_by_offset(offsets, {arm: name_of(arm) for arm in offsets})
    if len(data.history) > 1:
        found["trend"] = plots.tau_over_time(data.history)
    return found


def _cost_sentence(lineage: Sequence[LineageEntry]) -> str:
    """Return what the refresh took; empty if its durations are unknown."""
    total = wall_seconds(lineage)
    if not total:
        return ""
    longest = max(lineage, key=lambda entry: entry.manifest.duration_s)
    return (
        f"The refresh took {duration(total)} ({total:,.0f} s) of stages, reused ones included; the longest was "
        f"{longest.name} with {duration(longest.manifest.duration_s)}."
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
    piece = piece.replace("\n", "⏎")
    inner = piece.strip(" ")
    lead = len(piece) - len(piece.lstrip(" "))
    return "␣" * lead + inner + "␣" * (len(piece) - lead - len(inner)) if inner else "␣" * len(piece)
