"""How far a refresh goes, and what follows from it: drift before anything is spent, promotion behind the gate."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from draftsmith.artifacts.errors import RefusedError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.store.manifest import ArtifactRef, read_manifest
from draftsmith.artifacts.tracking.models import link_version
from draftsmith.artifacts.tracking.refresh_runs import OUTCOME
from draftsmith.artifacts.tracking.registry import CHAMPION, PROMOTION_TAGS, ChampionMovedError, Version
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.execution.display import Display
from draftsmith.flows.planning.graph import Conclusion, Node, OutdatedPlanError
from draftsmith.flows.refresh import promotion_hook
from draftsmith.flows.refresh.config import DEFAULT_SAMPLING, RefreshConfig, measured_with, prompts_since
from draftsmith.flows.refresh.line import (
    BLOCK_SIZE,
    MAX_CLOCK_SKEW_DAYS,
    age_days,
    check_held_out,
    failed_rules,
    log_tags,
    registry,
    tag_refreshed,
    version_tags,
    with_current_champion,
)
from draftsmith.flows.refresh.summary import DETAIL
from draftsmith.stages.data.logs.rehearsal_stage import is_available
from draftsmith.stages.data.time_window import LAST
from draftsmith.stages.drafters.stage import RECORD as TARGET_RECORD
from draftsmith.stages.evaluation.drift import fallen, unjudged
from draftsmith.stages.evaluation.gate import DECISION
from draftsmith.stages.evaluation.gate_rules import with_version
from draftsmith.stages.runtime.stage import Config

_MOST_OF_A_TAG = 250  # characters
_PLAN_ANEW = "Run the same command again: it plans anew and reuses what is done."
_IN_FRONT = ("target", "prompts", "heldout", "champion")  # nodes of the drift check's own


class RefreshPolicy:
    """Of one refresh of a line of drafters."""

    def __init__(self, config: RefreshConfig, force: Collection[str]) -> None:
        """config: resolved, with a registry. force: nodes; `drift` among them, or one behind it, makes the refresh go
        on whatever is seen."""
        assert config.registry is not None
        self.config, self.line = config, config.registry
        self._forced = sorted(set(force) - set(_IN_FRONT))
        self._drift_metrics: dict[str, float] = {}
        self._drift_tags: dict[str, str] = {}

    @property
    def sticky_force(self) -> frozenset[str]:
        """What a run that goes on must force: what was made again is no reason for its drift check any more."""
        return frozenset({"drift"} if self._forced and self.line.champion is not None else ())

    # -- drift ---------------------------------------------------------------------------------------------------

    def should_stop(self, node: Node, made: Mapping[str, Path]) -> Conclusion | None:
        """Behind the drift check: the refresh ends if the champion is current."""
        if node.name != "drift" or self.line.champion is None:
            return None
        promotion_hook.call_if_due(self.config.on_promote, self.line.name)
        drift = json.loads((made["drift"] / "drift.json").read_text("utf-8"))
        reasons = self._reasons(drift, json.loads((made["champion"] / TARGET_RECORD).read_text("utf-8")))
        self._drift_metrics = {f"{DETAIL}drift.{name}.tau": figures["tau"] for name, figures in drift.items()}
        self._drift_tags = {"drift": "; ".join(reasons)[:_MOST_OF_A_TAG] or "none"}
        champion, tau = self.line.champion, drift["all"]["tau"]
        seen = {"version": champion.version, **drift["all"], "decision": "; ".join(reasons)[:1000] or "current"}
        registry().add_drift(self.line.name, {"at": datetime.now(UTC).isoformat(timespec="seconds"), **seen})
        if reasons:
            Display().line(
                f"drift: the refresh goes on, with version {champion.version} as champion: {'; '.join(reasons)}"
            )
            return None
        before = (champion.figures.get("all") or {}).get("tau")
        said = [
            f"no set fell measurably by more than {self.config.drift.threshold:.1%}",
            *unjudged(drift, champion.figures),
            "nothing was trained (`--force drift` refreshes anyway)",
        ]
        message = (
            f"{self.line.name}: the champion (version {champion.version}) is current: tau {tau:.3f} on "
            f"{drift['all']['prompts']} prompts, {'unknown' if before is None else format(before, '.3f')} at its "
            f"promotion; {'; '.join(said)}"
        )
        metrics = {"tau.champion": tau, **self._drift_metrics}
        return Conclusion("Current", message, metrics=metrics, tags={OUTCOME: "current", **self._drift_tags})

    def _reasons(self, drift: Mapping[str, Any], record: Mapping[str, Any]) -> list[str]:
        """Why the refresh goes on; empty if nothing speaks for it."""
        champion, config = self.line.champion, self.config.drift
        assert champion is not None
        reasons = [f"{each} is forced" for each in self._forced]
        if self.line.restart:
            reasons.append("the line begins again (registry.restart)")
        if record["target_changed"]:
            reasons.append("the target has changed since its promotion")
        if (days := age_days(self.line.refreshed_at)) > config.max_age_days:
            reasons.append(f"the last refresh was {days:.0f} days ago, more than {config.max_age_days:g}")
        if days < -MAX_CLOCK_SKEW_DAYS:
            reasons.append(f"the last refresh was at {self.line.refreshed_at}, which is ahead of this machine's clock")
        if differently := self._measured_differently():  # unlike figures say nothing of drift
            return [*reasons, f"measured differently since its promotion: {', '.join(differently)}"]
        return reasons + fallen(drift, champion.figures, config.threshold)

    def _measured_differently(self) -> list[str]:
        """The settings that were others when the champion's figures were taken, in words; a version that does not say
        them has none."""
        now, kept = measured_with(self.config), self.line.measured_with
        return [
            f"{name} {_said(now[name])}, was {_said(was)}"
            for name, was in (DEFAULT_SAMPLING | kept if kept else {}).items()
            if now.get(name, was) != was and name != BLOCK_SIZE  # the trained one, now as then
        ]

    # -- promotion -----------------------------------------------------------------------------------------------

    def conclude(self, made: Mapping[str, ArtifactRef], run_id: str | None) -> Conclusion | None:
        """The challenger as a version of the line, and the champion if the gate says so."""
        decision = json.loads((made["gate"].path / DECISION).read_text("utf-8"))
        if self.line.champion is not None:
            decision = with_version(decision, self.line.champion.version)
        evaluation = json.loads((made["evaluation"].path / "evaluation.json").read_text("utf-8"))
        line, ref = registry(), made[decision["challenger"]]
        tags = version_tags(evaluation, decision, ref, self.config.prompts, measured_with(self.config))
        tags |= log_tags(made["logs"]) if "logs" in made else {}
        tags |= {"report": str(made["report"].path / "report.html")} if "report" in made else {}
        now = line.champion(self.line.name)
        expected = None if self.line.champion is None else line.version(self.line.name, self.line.champion.version)
        moved = (None if now is None else now.number) != (None if expected is None else expected.number)
        ours = decision["promote"] and now is not None and now.content_id == ref.content_id  # MLflow was lost behind it
        if moved and not ours:
            serves = "nobody" if now is None else f"version {now.number}"
            raise OutdatedPlanError(f"{self.line.name}: {serves} is the champion by now. {_PLAN_ANEW}")
        version = line.register(self.line.name, ref, tags, run_id=run_id, upload=self.line.upload)
        link_version(Tracking(home(), self.config.experiment), version, read_manifest(ref.path))
        if not decision["promote"]:
            said = f"{version} is not promoted: {decision['sentence']}"
            inconclusive = decision["outcome"] == "inconclusive"
            tag_refreshed(version)
            error = RefusedError(f"{version} is not promoted: {decision['outcome']}")  # the screen says why
            return self._conclusion("Inconclusive" if inconclusive else "Refused", said, decision, version, error)
        at = f"{version.line}@{version.number}"
        if (undone := line.rollback_event(version)) is not None:  # the same inputs have made it again
            said = (
                f"{version} is not promoted: {undone.by} took it out of service at {undone.at} ({undone.why}), and "
                f"nothing that makes it has changed since; to serve it: `draftsmith promote {at}`"
            )
            tag_refreshed(version)
            return self._conclusion("Refused", said, decision, version, RefusedError(said))
        if self.line.approve and CHAMPION not in version.aliases and not _approved(at):
            said = f"{version} waits for a person (registry.approve). To promote it: `draftsmith promote {at}`"
            tag_refreshed(version)
            return self._conclusion("Waiting", said, decision, version, RefusedError(said))
        return self._promote(version, expected, decision, tags)

    def _promote(
        self, version: Version, expected: Version | None, decision: Mapping[str, Any], tags: Mapping[str, str]
    ) -> Conclusion:
        says = promotion_hook.due(self.config.on_promote, decision)
        if "promoted_at" in version.tags:  # it comes back: what it is worth today
            says |= {name: tags[name] for name in PROMOTION_TAGS if name in tags}
        if CHAMPION in version.aliases:  # another launcher of the same config was faster
            says = {}
        try:
            registry().promote(version, expected=expected, why=decision["sentence"], tags=says)
        except ChampionMovedError as error:
            raise OutdatedPlanError(f"{error}. {_PLAN_ANEW}") from error
        tag_refreshed(version)
        said = f"{version} is the champion: {decision['sentence']}"
        if became := promotion_hook.call_if_due(self.config.on_promote, version.line):
            said += f"; {became}"
        return self._conclusion("Promoted", said, decision, version)

    def _conclusion(
        self,
        name: str,
        message: str,
        decision: Mapping[str, Any],
        version: Version,
        error: RefusedError | None = None,
    ) -> Conclusion:
        tags = {
            OUTCOME: name.lower(),
            "version": f"{version.line}@{version.number}",
            **({"rules": rules} if (rules := failed_rules(decision)) else {}),
            **self._drift_tags,
        }
        promoted = name == "Promoted"
        overruled = decision["promote"] and not promoted
        asset = f"draftsmith://line/{version.line}/champion" if promoted else ""
        metadata = {"version": version.number, "tau": float(version.tags["tau"]), "source": version.source}
        return Conclusion(
            name, message, error, self._drift_metrics, tags, overrules_review=overruled, asset=asset, metadata=metadata
        )


def _approved(key: str) -> bool:
    from draftsmith.flows.orchestration.announcements import approved  # imports Prefect

    return approved(key)


def _said(value: Any) -> str:
    return "left out" if value is None else f"{value}"


def resolve(config: RefreshConfig) -> RefreshConfig:
    """With the champion that serves now. Keys stay those of content: which content it is, is looked up once."""
    if config.registry is None:
        return config
    check_held_out(config.registry.name, config.prompts)
    line = with_current_champion(config.registry)
    found: dict[str, Config] = {"registry": line, "prompts": prompts_since(config.prompts, line.read_until)}
    if config.logs is not None and config.logs.since == LAST:
        found["logs"] = config.logs.model_copy(update={"after": line.read_until})
    if config.logs is not None and not config.logs.replay_share and line.answers and not is_available(line.answers):
        # on a machine without the store: rows that come late are lost rather than the refresh
        found["registry"] = line.model_copy(update={"answers": None})
    return config.model_copy(update=found)


def refresh_policy(config: RefreshConfig, force: Collection[str]) -> RefreshPolicy | None:
    return RefreshPolicy(config, force) if config.registry is not None else None
