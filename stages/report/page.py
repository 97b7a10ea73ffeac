"""The report of a refresh: one HTML file with everything inside, readable without a network. The verdict is first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.redaction import printable
from draftsmith.stages.report import plots, tables
from draftsmith.stages.report.names import duration, name_of
from draftsmith.stages.report.next_steps import Step
from draftsmith.stages.report.review import review_of
from draftsmith.stages.report.template import PAGE, STYLE

_SHOWN = 2  # contexts of each kind that are not folded


@dataclass(frozen=True)
class ReportData:
    """What a report shows. Anything absent (an empty mapping or list, a missing field) is left out or shown as —."""

    title: str
    evaluation: Mapping[str, Any] = field(default_factory=dict)  # evaluation.json
    decision: Mapping[str, Any] = field(default_factory=dict)  # decision.json of the gate
    facts: Mapping[str, str] = field(default_factory=dict)  # for the line below the title: name -> value
    steps: Sequence[Step] = ()
    history: Sequence[Mapping[str, Any]] = ()  # at, what (promoted, checked), version, tau, low, high
    contexts: Sequence[Mapping[str, Any]] = ()  # of the candidate, of contexts.json
    prompts: Mapping[str, Any] = field(default_factory=dict)  # prompts.json
    logs: Mapping[str, Any] = field(default_factory=dict)  # logs.json
    lineage: Sequence[Mapping[str, Any]] = ()  # name, stage, key, content_id, duration_s, metrics, created_at
    config: Mapping[str, Any] = field(default_factory=dict)  # artifact -> its stage's config


def render_report(path: Path, data: ReportData) -> None:
    """Write the page. The same data gives the same bytes."""
    from jinja2 import Environment

    def shown(value: Any) -> Any:
        return printable(value) if isinstance(value, str) and not hasattr(value, "__html__") else value  # not our HTML

    environment = Environment(autoescape=True, finalize=shown)
    environment.filters["marked"] = _marked
    evaluation, review = data.evaluation, review_of(data.evaluation, data.decision)
    page = environment.from_string(PAGE).render(
        title=data.title,
        facts=data.facts,
        style=STYLE,
        review=review,
        warnings=[*(review.warnings if review else ()), *_of_logs(data.logs)],
        spent=_spent(data.lineage),
        steps=data.steps,
        chosen=tables.chosen(evaluation) if data.decision else "",
        contexts=_in_order(data.contexts),
        shown=2 * _SHOWN,
        data=_json({"prompts": data.prompts, "logs": data.logs}) if data.prompts or data.logs else "",
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
    drafters = data.evaluation.get("drafters") or {}
    if offsets := {arm: d["acceptance_by_offset"] for arm, d in drafters.items() if d.get("acceptance_by_offset")}:
        found["by_offset"] = plots.acceptance_by_offset(offsets, {arm: name_of(arm) for arm in offsets})
    if len(data.history) > 1:
        found["trend"] = plots.tau_over_time(data.history)
    return found


def _spent(lineage: Sequence[Mapping[str, Any]]) -> str:
    """What the refresh cost."""
    total = sum(each.get("duration_s") or 0.0 for each in lineage)
    if not total:
        return ""
    longest = max(lineage, key=lambda each: each.get("duration_s") or 0.0)
    return (
        f"The refresh took {duration(total)} ({total:,.0f} s) of stages, reused ones included; the longest was "
        f"{longest.get('name')} with {duration(longest['duration_s'])}."
    )


def _of_logs(logs: Mapping[str, Any]) -> list[str]:
    return [
        f"{count} of {logs.get('scored')} logged answers that were checked are improbable: {reason}."
        for reason, count in (logs.get("improbable") or {}).items()
        if count
    ]


def _json(shown: Mapping[str, Any]) -> str:
    return json.dumps(shown, indent=2, sort_keys=True, ensure_ascii=False, default=str)


def _in_order(contexts: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The two worst, two typical ones, then the rest."""
    typical = [each for each in contexts if each.get("kind") == "typical"]
    worst = [each for each in contexts if each.get("kind") != "typical"]
    return [*worst[:_SHOWN], *typical[:_SHOWN], *worst[_SHOWN:], *typical[_SHOWN:]]


def _marked(piece: str) -> str:
    """White space that could not be seen at the edges of a mark, made visible."""
    piece = piece.replace("\n", "⏎")
    inner = piece.strip(" ")
    lead = len(piece) - len(piece.lstrip(" "))
    return "␣" * lead + inner + "␣" * (len(piece) - lead - len(inner)) if inner else "␣" * len(piece)
