"""Body of stage `report`: `report.html`, `headline.json` and `review.json`."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from draftsmith.artifacts.atomic import write_text
from draftsmith.artifacts.home import home
from draftsmith.artifacts.results.base import ResultFile
from draftsmith.artifacts.results.data import LogsSummary, PromptsSummary
from draftsmith.artifacts.results.evaluation import Contexts, DriftResult, EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision, ReviewResult
from draftsmith.artifacts.store.manifest import Artifact, read_manifest
from draftsmith.artifacts.store.mirror import open_store
from draftsmith.stages.report.metrics import LineageEntry, read_lineage, report_metrics
from draftsmith.stages.report.page import ReportData, render_report
from draftsmith.stages.report.review import machine_text, review_of, target_name
from draftsmith.stages.report.stage import HistoryPoint, ReportConfig
from draftsmith.stages.report.tables import next_steps
from draftsmith.stages.runtime.invocation import COMMAND, invocation
from draftsmith.stages.runtime.stage import StageContext

_HEADLINE = {"tau", "tau_low", "tau_high", "differences"}
R = TypeVar("R", bound=ResultFile)


def run(ctx: StageContext, config: ReportConfig) -> None:
    """Write `report.html`, `headline.json` with the metrics that do not depend on time, and `review.json` with the
    review, all metrics and the configs, which MLflow shows."""
    folder = ctx.inputs["evaluation"]
    evaluation = EvaluationResult.read(folder)
    decision = GateDecision.read(ctx.inputs["gate"]) if "gate" in ctx.inputs else None
    if decision is not None and config.champion is not None:
        decision = decision.with_version(config.champion[1])
    lineage = list(read_lineage(ctx.inputs, config))
    by_stage = {entry.manifest.stage: entry for entry in lineage}
    prompts = _fetch_result(PromptsSummary, by_stage.get("prompts"))
    logs = _fetch_result(LogsSummary, by_stage.get("logs"))
    contexts = Contexts.read_if_there(folder) if config.contexts else None
    review = review_of(evaluation, decision)
    target = target_name(str(by_stage["target"].manifest.config.get("source", ""))) if "target" in by_stage else ""
    against = f"against version {config.champion[1]}" if config.champion is not None else "no champion yet"
    line = f"line {config.line}, {against}" if config.line is not None else ""
    command = invocation(os.environ.get(COMMAND), config.line)
    seconds = {entry.name: entry.manifest.duration_s for entry in lineage}
    data = ReportData(
        title=" · ".join(filter(None, ["Draft model refresh", target, line])),
        evaluation=evaluation,
        decision=decision,
        facts=_facts(evaluation, lineage, logs),
        steps=next_steps(review, command, seconds),
        history=[*config.history, *_measured_now(ctx.inputs, evaluation, decision)],
        contexts=contexts.root.get(evaluation.challenger, ()) if contexts is not None else (),
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
    ctx.log(f"{review.outcome.label}. {review.outcome.sentence}")
    content = {
        **review.model_dump(),
        "metrics": report_metrics(evaluation, decision, lineage, {"prompts": prompts, "logs": logs}),
        "config": {entry.name: entry.settings for entry in lineage},
        "artifacts": {entry.name: entry.key for entry in lineage},
    }
    write_text(ctx.out / ReviewResult.FILE, json.dumps(content, indent=1, sort_keys=True, default=str) + "\n")
    ctx.summary(**{f"tau_{arm}": drafter.tau for arm, drafter in evaluation.drafters.items()})


def _facts(evaluation: EvaluationResult, lineage: Sequence[LineageEntry], logs: LogsSummary | None) -> dict[str, str]:
    """Return the time, place, user and data of the measurement."""
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
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return ""


def _fetch_result(kind: type[R], entry: LineageEntry | None) -> R | None:
    """Read a file of an artifact, from the store's bucket if another host made it; None if there is none."""
    if entry is None:
        return None
    if not (entry.folder / kind.FILE).is_file() and kind.FILE in entry.manifest.files:
        open_store(home()).fetch(Artifact(entry.folder, entry.manifest), [kind.FILE])
    return kind.read_if_there(entry.folder)


def _measured_now(
    inputs: Mapping[str, Path], evaluation: EvaluationResult, decision: GateDecision | None
) -> Iterator[HistoryPoint]:
    """Yield this refresh's additions to the history of its line: its drift check, and its challenger."""
    if "drift" in inputs:
        overall = DriftResult.read(inputs["drift"]).overall.to_json()
        at = read_manifest(inputs["drift"]).created_at
        yield HistoryPoint.model_validate({"at": at, "what": "checked", **overall})
    if decision is not None:
        drafter, at = evaluation.drafters[decision.challenger], read_manifest(inputs["evaluation"]).created_at
        yield HistoryPoint(at=at, what="now", tau=drafter.tau, low=drafter.tau_low, high=drafter.tau_high)
