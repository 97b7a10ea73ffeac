"""The steps of a promotion: a version's tags, the alias, the servers, and the conclusion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from pydantic import JsonValue

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.data import LogsSummary
from draftsmith.artifacts.results.evaluation import EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.artifacts.store.manifest import Artifact, sha256_file
from draftsmith.artifacts.tracking.refresh_runs import OUTCOME, VERSION
from draftsmith.artifacts.tracking.registry import CHAMPION, PROMOTION_TAGS, ChampionMovedError, Version
from draftsmith.flows.planning.plan import UNSERVED, Conclusion, OutdatedPlanError
from draftsmith.flows.refresh.champion import held_out_shares, suffix_digests
from draftsmith.flows.refresh.config import RefreshConfig, RegistryConfig, measured_with
from draftsmith.flows.refresh.drift import MAX_CLOCK_SKEW_DAYS, age_days
from draftsmith.flows.refresh.swap import swap_in_run
from draftsmith.flows.refresh.versions import (
    BLOCK_SIZE,
    BY,
    CONFIDENCE,
    FASTEST_BLOCK,
    KIND,
    MEASURED_WITH,
    REFRESHED_AT,
    SCHEDULE,
    SHARES,
    STEP_COSTS,
    SUFFIXES,
    registry,
)
from draftsmith.stages.data.logs.earlier import TABLE, EarlierConfig
from draftsmith.stages.data.prompts.stage import PromptsConfig
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.drafters.digest import drafter_digest

_MAX_METRICS_CHARS = 4900  # MLflow keeps 5,000 characters of a tag
_MAX_RULES_CHARS = 250
_SHORT_SET = ("tau", "low", "prompts")  # metrics of a set that are stored if there are many sets
_PLAN_AGAIN = "Run the same command again. It plans again and reuses what is done."
Swapped = tuple[str, DraftsmithError | None]  # what happened to the servers, and why one does not draft as it should
NO_SERVERS: Swapped = ("", None)


def expected_champion(line: RegistryConfig, gate: GateDecision, challenger: Artifact) -> Version | None:
    """Return the champion that the gate has judged against, as it is in the registry.

    Raises OutdatedPlanError if another version became champion meanwhile, except this challenger: MLflow may have been
    lost just after its promotion.
    """
    lines = registry()
    now = lines.champion(line.name)
    expected = None if line.champion is None else lines.version(line.name, line.champion.version)
    moved = (None if now is None else now.number) != (None if expected is None else expected.number)
    ours = gate.promote and now is not None and now.content_id == challenger.content_id
    if moved and not ours:
        serves = "no version" if now is None else f"version {now.number}"
        raise OutdatedPlanError(f"{line.name}: {serves} is now the champion. {_PLAN_AGAIN}")
    return expected


def move_alias(version: Version, expected: Version | None, gate: GateDecision, tags: Mapping[str, str]) -> None:
    """Make a version the champion in place of the expected one. tags: those that it was registered with."""
    new_tags: dict[str, str] = {}
    # an earlier champion that returns gets today's metrics, unless another launcher of the same config promoted it
    if "promoted_at" in version.tags and CHAMPION not in version.aliases:
        new_tags = {name: tags[name] for name in PROMOTION_TAGS if name in tags}
    try:
        registry().promote(version, expected=expected, why=gate.sentence, tags=new_tags)
    except ChampionMovedError as error:
        raise OutdatedPlanError(f"{error} {_PLAN_AGAIN}") from error


def swap_servers(line: RegistryConfig) -> Swapped:
    """Have the servers of `registry.servers` draft with the champion. A failure is returned."""
    champion = registry().champion(line.name) if line.servers else None
    if champion is None:
        return NO_SERVERS
    try:
        return swap_in_run(champion, line.servers), None
    except DraftsmithError as error:
        return f"swap failed: {error}", error


def with_servers(conclusion: Conclusion, swapped: Swapped) -> Conclusion:
    """Return the conclusion with what happened to the servers: `Unserved` if only that failed."""
    text, unserved = swapped
    message = "; ".join(filter(None, [conclusion.message, text]))
    if conclusion.error is not None or unserved is None:
        return replace(conclusion, message=message)
    error = type(unserved)(message)
    return replace(conclusion, name=UNSERVED, message=message, error=error, overrules_review=True)


def conclusion_of(
    name: str,
    message: str,
    gate: GateDecision,
    version: Version,
    tags: Mapping[str, str],
    *,
    error: DraftsmithError | None,
) -> Conclusion:
    """Return the conclusion of a refresh that has registered a version. tags: those of its drift check."""
    rules = {"rules": failed} if (failed := failed_rules(gate)) else {}
    promoted = name == "Promoted"
    return Conclusion(
        name,
        message,
        error,
        tags={OUTCOME: name.lower(), VERSION: f"{version.line}@{version.number}", **rules, **tags},
        overrules_review=gate.promote and not promoted,
        asset=f"draftsmith://line/{version.line}/champion" if promoted else "",
        metadata={"version": version.number, "tau": float(version.tags["tau"]), "source": version.source},
    )


def tags_of(config: RefreshConfig, gate: GateDecision, folders: Mapping[str, Path]) -> dict[str, str]:
    """Return the tags of the challenger's version in a refresh. folders: node -> folder."""
    evaluation = EvaluationResult.read(folders["evaluation"])
    settings = measured_with(config)
    tags = version_tags(evaluation, gate, folders[gate.challenger], config.prompts, settings)
    if evaluation.target_difference is not None:  # a drift check replays, so it compares with replay
        replayed = EvaluationResult.read(folders["evaluation"], EvaluationResult.ACCEPTANCE_FILE)
        replayed = replayed.model_copy(update={"speed": evaluation.speed})
        tags["figures"] = json.dumps(promotion_metrics(replayed, gate.challenger))
    tags |= log_tags(folders["logs"]) if "logs" in folders else {}
    return tags | ({"report": str(folders["report"] / "report.html")} if "report" in folders else {})


def version_tags(
    evaluation: EvaluationResult,
    decision: GateDecision,
    artifact: Path,
    prompts: PromptsConfig,
    settings: Mapping[str, JsonValue],
) -> dict[str, str]:
    """Return the tags of a challenger's version: its metrics, target, parents and the gate's decision.

    artifact: the challenger's folder. settings: what its tau depends on (`measured_with`).
    """
    from draftsmith.stages.drafters.checkpoint import read_config, read_info  # import torch, and planning must not

    arm, folder = decision.challenger, artifact / DRAFTER_FOLDER
    info, drafter = read_info(folder), evaluation.drafters[arm]
    speed = evaluation.speed.get(arm)
    return {
        "arm": arm,
        KIND: read_config(folder)[0],
        "drafter_digest": drafter_digest(folder),
        "target_digest": info.target_digest,
        "parents": json.dumps(info.parents[-8:]),
        "tau": f"{drafter.tau:.4f}",
        "tau_interval": json.dumps([drafter.tau_low, drafter.tau_high]),
        "speedup": f"{speed.speedup:.4f}" if speed and speed.speedup is not None else "",
        FASTEST_BLOCK: str((speed and speed.block_size) or ""),
        STEP_COSTS: json.dumps(evaluation.step_costs(arm)),
        SCHEDULE: json.dumps(evaluation.schedule(arm)),
        "speedup_interval": json.dumps([speed and speed.speedup_low, speed and speed.speedup_high]),
        "figures": json.dumps(promotion_metrics(evaluation, arm)),
        MEASURED_WITH: json.dumps({**settings, BLOCK_SIZE: drafter.block_size}),
        CONFIDENCE: drafter.confidence.model_dump_json() if drafter.confidence is not None else "",
        "decision": decision.sentence[:4000],
        "outcome": decision.outcome,
        "rules": failed_rules(decision),
        **prompt_tags(prompts),
    }


def failed_rules(decision: GateDecision) -> str:
    """Return the names of the broken rules, then of the inconclusive ones; empty if all passed."""
    kinds = {
        "broken": [rule.name for rule in decision.failed if rule.broken],
        "inconclusive": [rule.name for rule in decision.failed if not rule.broken],
    }
    return "; ".join(f"{kind}: {', '.join(names)}" for kind, names in kinds.items() if names)[:_MAX_RULES_CHARS]


def prompt_tags(prompts: PromptsConfig) -> dict[str, str]:
    """Return the tags by which `check_held_out` knows the prompts that measured a version."""
    return {
        SHARES: json.dumps(held_out_shares(prompts)),
        BY: prompts.heldout_by,
        SUFFIXES: json.dumps(suffix_digests(prompts), default=sorted),
    }


def tag_refreshed(version: Version) -> None:
    """Tag the version with the time at which a refresh ended, and remove tags of clocks that were ahead."""
    lines = registry()
    for other in lines.versions(version.line):
        if age_days(other.tags.get(REFRESHED_AT) or None) < -MAX_CLOCK_SKEW_DAYS:
            lines.tag(other, {REFRESHED_AT: ""})
    lines.tag(version, {REFRESHED_AT: datetime.now(UTC).isoformat(timespec="seconds")})


def log_tags(logs: Path) -> dict[str, str]:
    """Return the tags that name a version's logged answers and the time from which `since: last` reads next."""
    summary = LogsSummary.read(logs)
    artifact = {"folder": str(logs), "sha256": sha256_file(logs / TABLE)}
    answers = EarlierConfig.model_validate({**artifact, **summary.given_by})
    return {"answers": answers.model_dump_json(), "read_until": summary.window.newest or ""}


def promotion_metrics(evaluation: EvaluationResult, arm: str) -> dict[str, dict[str, float | None]]:
    """Return an arm's tau and speed-up with their intervals on all prompts, and on as many slices as a tag holds.

    Later drift checks compare tau with these.
    """
    drafter, speed = evaluation.drafters[arm], evaluation.speed[arm].to_json() if arm in evaluation.speed else {}
    overall = {"tau": drafter.tau, "low": drafter.tau_low, "high": drafter.tau_high}
    overall |= {name: speed[name] for name in ("speedup", "speedup_low", "speedup_high") if name in speed}
    overall = _rounded({**overall, "prompts": drafter.prompts})
    sets = {name: _rounded(arms[arm].to_json()) for name, arms in evaluation.sets.items()}
    if len(json.dumps({"all": overall, **sets})) > _MAX_METRICS_CHARS:
        sets = {name: {key: metrics[key] for key in _SHORT_SET if key in metrics} for name, metrics in sets.items()}
    while len(json.dumps({"all": overall, **sets})) > _MAX_METRICS_CHARS:
        sets.popitem()
    return {"all": overall, **sets}


def _rounded(metrics: Mapping[str, float | None]) -> dict[str, float | None]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in metrics.items()}
