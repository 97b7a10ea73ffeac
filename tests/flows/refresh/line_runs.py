"""Artifacts and decisions of a refresh of a line, after its drift check or its gate."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.flows.planning.plan import Conclusion
from draftsmith.flows.refresh.champion import resolve
from draftsmith.flows.refresh.config import RefreshConfig
from draftsmith.flows.refresh.drift import current
from draftsmith.flows.refresh.flow import check_drift, promote
from draftsmith.flows.refresh.promotion import with_servers
from draftsmith.flows.refresh.versions import registry
from draftsmith.stages.report.page import ReportData, render_report
from tests.testbed.artifacts import committed


def config_of(line: str, **sections: Any) -> RefreshConfig:
    logs = {"paths": ["answers.jsonl"], "temperature": 0}
    given = {"name": "weekly", "registry": {"name": line}, "target": {"source": "nowhere"}, "logs": logs}
    return RefreshConfig.model_validate(given | sections)


def gated(
    store: Store,
    drafter: Artifact,
    outcome: str = "promoted",
    tau: float = 2.5,
    champion: str | None = None,
    block_size: int = 4,
) -> dict[str, Artifact]:
    """Return the artifacts of a refresh after its gate. champion: as the gate names it, None without one."""
    interval = {"tau_low": tau - 0.1, "tau_high": tau + 0.1}
    taus = {"tau": tau, **interval, "prompts": 40, "block_size": block_size}
    chat = {
        "tau": 2.5,
        "low": 2.4,
        "high": 2.6,
        "prompts": 40,
        "speedup": 1.25,
        "speedup_low": 1.2,
        "speedup_high": 1.3,
    }
    speed = {"tokens_per_s": 100.0, "speedup": 1.2, "speedup_low": 1.15, "speedup_high": 1.25}
    evaluation = {"drafters": {"opd": taus}, "speed": {"opd": speed}, "sets": {"chat": {"opd": chat}}}
    rule = {"name": "speed-up", "passed": False, "conclusive": outcome == "refused", "text": "why", "metrics": {}}
    decision = {
        "challenger": "opd",
        "promote": outcome == "promoted",
        "outcome": outcome,
        "champion": champion,
        "rules": [] if outcome == "promoted" else [rule],
        "sentence": f"{outcome}: why" if champion is None else f"{outcome}: opd beats the champion",
    }

    def of_stage(stage: str, file: str, content: dict[str, Any]) -> Artifact:
        key = {"a": "1", "b": "2", "c": "3"}[drafter.key[0]]
        return committed(store, stage, {file: json.dumps(content)}, key)

    measured = of_stage("evaluation", "evaluation.json", evaluation)
    return {"opd": drafter, "evaluation": measured, "gate": of_stage("gate", "decision.json", decision)}


def folders_of(made: Mapping[str, Artifact]) -> dict[str, Path]:
    return {name: ref.path for name, ref in made.items()}


def finished(config: RefreshConfig, made: Mapping[str, Artifact], run_id: str | None = None) -> Conclusion:
    """Return the conclusion of a refresh that is planned now and has made these artifacts."""
    return promote(resolve(config), folders_of(made), run_id)


def serving(line: str) -> int | None:
    """Return the number of the champion's version; None if there is none."""
    champion = registry().champion(line)
    return None if champion is None else champion.number


def page_of(made: Mapping[str, Artifact]) -> str:
    """Return the report page, which is written before the promotion."""
    evaluation, decision = EvaluationResult.read(made["evaluation"].path), GateDecision.read(made["gate"].path)
    page = made["gate"].path.parent / "report.html"
    render_report(page, ReportData("a report", evaluation, decision))
    return page.read_text()


def checked(
    config: RefreshConfig, home: Path, asked: Collection[str] = (), *, target_changed: bool = False, **sets: Any
) -> Conclusion | None:
    """Return the conclusion of a resolved refresh after its drift check; None if it continues.

    asked: nodes of `--force`. sets: what the check measured; tau on all prompts is unchanged by default.
    """
    made = {name: home / "store" / name for name in ("drift", "champion")}
    adopted = {"target": "of today", "target_changed": target_changed, "trained_for": "of its promotion"}
    for name, file, content in (
        ("drift", "drift.json", {"all": {"tau": 2.5, "low": 2.4, "high": 2.6, "prompts": 40}, **sets}),
        ("champion", "champion.json", adopted),
    ):
        made[name].mkdir(exist_ok=True)
        (made[name] / file).write_text(json.dumps(content))
    drift, swapped = check_drift(config, made, set(asked))
    return None if drift.reasons else with_servers(current(config, drift), swapped)
