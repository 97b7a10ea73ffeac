"""Body of stage `report`: `report.html`, `headline.json` and `review.json`."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.home import home
from draftsmith.artifacts.results.base import ResultFile
from draftsmith.artifacts.results.data import LogsSummary, PromptsSummary
from draftsmith.artifacts.results.evaluation import AnswerContext, Contexts, DriftResult, EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision, ReviewResult
from draftsmith.artifacts.store.manifest import MANIFEST, read_manifest
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.stages.report.metrics import LineageEntry, read_lineage, report_metrics
from draftsmith.stages.report.page import ReportData, render_report
from draftsmith.stages.report.presentation import COMMAND, invocation, next_steps
from draftsmith.stages.report.review import machine_text, review_of, target_name
from draftsmith.stages.report.stage import HistoryPoint, ReportConfig
from draftsmith.stages.runtime.stage import StageContext

_HEADLINE = {"tau", "tau_low", "tau_high", "differences"}
R = TypeVar("R", bound=ResultFile)


def run(ctx: StageContext, config: ReportConfig) -> None:
    """Write `report.html`, `headline.json` with its metrics that do not depend on time, and `review.json` with the
    review, all metrics and the configs: what MLflow shows."""
    folder = ctx.inputs["evaluation"]
    evaluation = EvaluationResult.read(folder)
    decision = GateDecision.read(ctx.inputs["gate"]) if "gate" in ctx.inputs else None
    if decision is not None and config.champion is not None:
        decision = decision.with_version(config.champion[1])
    lineage = list(read_lineage(ctx.inputs, config))
    by_stage = {entry.manifest.stage: entry for entry in lineage}
    prompts, logs = (
        _fetch_result(PromptsSummary, by_stage.get("prompts")),
        _fetch_result(LogsSummary, by_stage.get("logs")),
    )
    review = review_of(evaluation, decision)
    target = target_name(str(by_stage["target"].manifest.config.get("source", ""))) if "target" in by_stage else ""
    command = invocation(os.environ.get(COMMAND), config.line)
    seconds = {entry.name: entry.manifest.duration_s for entry in lineage}
    data = ReportData(
        title=" · ".join(filter(None, ["Draft model refresh", target, _line_text(config)])),
        evaluation=evaluation,
        decision=decision,
        facts=_facts(evaluation, lineage, logs),
        steps=next_steps(review, command, seconds) if review is not None else (),
        history=[
            *config.history,
            *_drift_point(ctx.inputs.get("drift")),
            *_challenger_point(folder, evaluation, decision),
        ],
        contexts=_contexts(folder, evaluation),
        prompts=prompts,
        logs=logs,
        lineage=lineage,
        config={
            f"{entry.name} ({entry.manifest.stage}/{entry.manifest.key[:8]})": entry.manifest.config
            for entry in lineage
        },
    )
    render_report(ctx.out / "report.html", data)
    drafters = {arm: drafter.to_json() for arm, drafter in evaluation.drafters.items()}
    headline = {
        arm: {name: value for name, value in drafter.items() if name in _HEADLINE} for arm, drafter in drafters.items()
    }
    write_text(ctx.out / "headline.json", json.dumps(headline, indent=2, sort_keys=True) + "\n")
    if review is not None:
        ctx.log(f"{review.outcome.label}. {review.outcome.sentence}")
    content = {
        **({"outcome": None, "doubts": []} if review is None else review.model_dump(by_alias=True)),
        "figures": report_metrics(evaluation, decision, lineage, {"prompts": prompts, "logs": logs}),
        "config": {entry.name: entry.settings for entry in lineage},
        "artifacts": {entry.name: entry.key for entry in lineage},
    }
    write_text(ctx.out / ReviewResult.FILE, json.dumps(content, indent=1, sort_keys=True, default=str) + "\n")
    ctx.summary(**{f"tau_{arm}": drafter.tau for arm, drafter in evaluation.drafters.items()})


def _line_text(config: ReportConfig) -> str:
    if config.line is None:
        return ""
    against = f"against version {config.champion[1]}" if config.champion is not None else "no champion yet"
    return f"line {config.line}, {against}"


def _facts(evaluation: EvaluationResult, lineage: Sequence[LineageEntry], logs: LogsSummary | None) -> dict[str, str]:
    """Return when, where, by whom and from what the metrics were measured."""
    times = [entry.manifest.created_at for entry in lineage if entry.manifest.created_at]
    ends: list[str] = []
    if logs is not None:
        since = logs.window.since or logs.window.after
        ends = [f"from {since}" if since else "", f"to {logs.window.newest}" if logs.window.newest else ""]
    return {
        "data": " ".join(filter(None, ends)),
        "measured": f"{max(times)[:16].replace('T', ' ')} UTC" if times else "",
        "on": machine_text(evaluation),
        "engine": evaluation.engine,
        "commit": _commit(),
        "run by": _user(),
    }


def _commit() -> str:
    """Return the commit of the folder that the run was started in; empty without one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return found.stdout.strip() if found.returncode == 0 else ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""


def _fetch_result(kind: type[R], entry: LineageEntry | None) -> R | None:
    """Read a file of an artifact, from the store's bucket if another host made it; None if it has none."""
    if entry is None:
        return None
    if not (entry.folder / kind.FILE).is_file() and kind.FILE in entry.manifest.files:
        open_store(home()).fetch(entry.manifest.ref(entry.folder), [kind.FILE])
    return kind.read_if_there(entry.folder)


def _contexts(folder: Path, evaluation: EvaluationResult) -> Sequence[AnswerContext]:
    """Return the contexts of the challenger."""
    contexts = Contexts.read_if_there(folder)
    return contexts.root.get(evaluation.challenger, ()) if contexts is not None and evaluation.drafters else ()


def _drift_point(folder: Path | None) -> Iterator[HistoryPoint]:
    """Yield what this refresh's drift check measured, if there was one."""
    if folder is not None and (folder / MANIFEST).is_file():
        overall = DriftResult.read(folder).overall.to_json()
        yield HistoryPoint.model_validate({"at": read_manifest(folder).created_at, "what": "checked", **overall})


def _challenger_point(
    folder: Path, evaluation: EvaluationResult, decision: GateDecision | None
) -> Iterator[HistoryPoint]:
    """Yield the acceptance length of this refresh's challenger, for the history of its line."""
    if decision is not None and (folder / MANIFEST).is_file():
        drafter = evaluation.drafters[decision.challenger]
        yield HistoryPoint(
            at=read_manifest(folder).created_at, what="now", tau=drafter.tau, low=drafter.tau_low, high=drafter.tau_high
        )
