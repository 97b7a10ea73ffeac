"""Decides whether a refresh continues after its drift check, and what follows from the gate's decision.

A promotion has servers draft with the champion.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from draftsmith.artifacts.errors import DraftsmithError, RefusedError
from draftsmith.artifacts.home import home
from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.drafting import AdoptedChampion
from draftsmith.artifacts.results.evaluation import ALL, DriftResult, EvaluationResult
from draftsmith.artifacts.results.gate import GateDecision
from draftsmith.artifacts.store.manifest import Artifact, read_manifest
from draftsmith.artifacts.tracking.refresh_runs import OUTCOME, VERSION, link_version
from draftsmith.artifacts.tracking.registry import CHAMPION, PROMOTION_TAGS, ChampionMovedError, Version
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.config.options import RunOptions
from draftsmith.flows.execution.display import Display
from draftsmith.flows.planning.graph import Node
from draftsmith.flows.planning.plan import UNSERVED, Conclusion, EarlyEnd, OutdatedPlanError
from draftsmith.flows.refresh.config import CHAMPION as CHAMPION_WEIGHTS
from draftsmith.flows.refresh.config import RefreshConfig, measured_with, prompts_since
from draftsmith.flows.refresh.line import (
    BLOCK_SIZE,
    MAX_CLOCK_SKEW_DAYS,
    age_days,
    check_held_out,
    failed_rules,
    log_tags,
    promotion_metrics,
    registry,
    tag_refreshed,
    version_tags,
    with_current_champion,
)
from draftsmith.flows.refresh.swap import swap_in_run
from draftsmith.stages.data.logs.earlier import is_available
from draftsmith.stages.data.time_window import LAST
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER
from draftsmith.stages.runtime.stage import Config
from draftsmith.stages.runtime.statistics import CONFIDENCE, simultaneous_level

_MAX_TAG_CHARS = 250
_PLAN_AGAIN = "Run the same command again. It plans again and reuses what is done."
_BEFORE_DRIFT = ("target", "prompts", "heldout", "champion")  # inputs of the drift check


class RefreshPolicy:
    """The run policy of one refresh of a model line."""

    def __init__(self, config: RefreshConfig, force: Collection[str]) -> None:
        """Take a resolved config with a registry.

        force: nodes to make again or to start from. With `drift` or a later one, the refresh continues whatever the
        drift check finds.
        """
        assert config.registry is not None
        self.config, self.line = config, config.registry
        self._forced = sorted(set(force) - set(_BEFORE_DRIFT))
        self._drift_tags: dict[str, str] = {}
        self._swapped = ""  # what happened to the servers
        self._unserved: DraftsmithError | None = None  # why a server does not draft with the champion

    @property
    def sticky_force(self) -> frozenset[str]:
        """Return what a continued run must force again: without it the drift check would find nothing and stop."""
        return frozenset({"drift"} if self._forced and self.line.champion is not None else ())

    # -- drift ---------------------------------------------------------------------------------------------------

    def early_end(self, folders: Mapping[str, Path]) -> EarlyEnd | None:
        """Return the drift check, unless it is known to find a reason to continue. folders: of what is reused."""
        if self.line.champion is None:
            return None
        known = {"drift", "champion"} <= folders.keys()
        drift = DriftResult.read(folders["drift"]) if known else None
        if self._reasons(drift, target_changed=known and AdoptedChampion.read(folders["champion"]).target_changed):
            return None
        what = "not made: the champion is current (`--force drift` refreshes anyway)"
        return EarlyEnd("drift", what if known else "then, only if tau has fallen", certain=known)

    def should_stop(self, node: Node, folders: Mapping[str, Path]) -> Conclusion | None:
        """Return the conclusion `Current` after a drift check that finds no reason to continue."""
        if node.name != "drift" or self.line.champion is None:
            return None
        self._swap_servers()  # one may have started again with its old drafter
        if self._swapped:
            Display().line(self._swapped)
        drift = DriftResult.read(folders["drift"])
        adopted = AdoptedChampion.read(folders["champion"])
        reasons = self._reasons(drift, target_changed=adopted.target_changed)
        self._drift_tags = {"drift": "; ".join(reasons)[:_MAX_TAG_CHARS] or "none"}
        champion, overall = self.line.champion, drift.overall
        check = {"version": champion.version, **overall.to_json(), "decision": "; ".join(reasons)[:1000] or "current"}
        registry().add_drift(self.line.name, {"at": datetime.now(UTC).isoformat(timespec="seconds"), **check})
        if reasons:
            Display().line(
                f"drift: the refresh continues, with version {champion.version} as champion: {'; '.join(reasons)}"
            )
            return None
        before = (champion.figures.get("all") or {}).get("tau")
        notes = [
            f"no slice fell measurably by more than {self.config.drift.threshold:.1%}",
            *inconclusive_sets(drift.root, _set_metrics(champion.figures)),
            "nothing was trained (`--force drift` refreshes anyway)",
        ]
        message = (
            f"{self.line.name}: the champion (version {champion.version}) is current: tau {overall.tau or 0.0:.3f} on "
            f"{overall.prompts} prompts, {'unknown' if before is None else format(before, '.3f')} at its "
            f"promotion; {'; '.join(notes)}"
        )
        tags = {OUTCOME: "current", **self._drift_tags}
        return self._with_servers(
            Conclusion("Current", message, metrics={"tau.champion": overall.tau or 0.0}, tags=tags)
        )

    def _reasons(self, drift: DriftResult | None, *, target_changed: bool) -> list[str]:
        """Return why the refresh continues; empty if there is no reason. drift: None before the check."""
        champion, config = self.line.champion, self.config.drift
        assert champion is not None
        reasons = [f"{name} is asked for (--force or --from)" for name in self._forced]
        if self.line.restart:
            reasons.append("the line starts again (--restart)")
        if target_changed:
            reasons.append("the target has changed since its promotion")
        if (days := age_days(self.line.refreshed_at)) > config.max_age_days:
            ago = f"{days:.0f}" if days >= 10 else f"{days:.2g}"  # never 0
            reasons.append(f"the last refresh was {ago} days ago, more than {config.max_age_days:g}")
        if days < -MAX_CLOCK_SKEW_DAYS:
            reasons.append(f"the last refresh was at {self.line.refreshed_at}, which is ahead of this machine's clock")
        if changes := self._changed_settings():  # taus that were measured differently do not show drift
            return [*reasons, f"measured differently since its promotion: {', '.join(changes)}"]
        fallen = degraded_sets(drift.root, _set_metrics(champion.figures), config.threshold) if drift else []
        return reasons + fallen

    def _changed_settings(self) -> list[str]:
        """Describe the settings that have changed since the champion was measured; none if they are unknown."""
        current, stored = measured_with(self.config), self.line.measured_with
        return [
            f"{name} {_describe(current[name])}, was {_describe(before)}"
            for name, before in stored.items()
            if current.get(name, before) != before and name != BLOCK_SIZE  # left out: the trained one, as then
        ]

    # -- promotion -----------------------------------------------------------------------------------------------

    def conclude(self, folders: Mapping[str, Path], run_id: str | None) -> Conclusion | None:
        """Register the challenger as a version of the line, and promote it if the gate says so."""
        decision = GateDecision.read(folders["gate"])
        if self.line.champion is not None:
            decision = decision.with_version(self.line.champion.version)
        manifest = read_manifest(folders[decision.challenger])
        lines, ref = registry(), Artifact(folders[decision.challenger], manifest)
        tags = self._version_tags(folders, decision)
        current = lines.champion(self.line.name)
        expected = None if self.line.champion is None else lines.version(self.line.name, self.line.champion.version)
        moved = (None if current is None else current.number) != (None if expected is None else expected.number)
        # this challenger may be the champion already, if MLflow was lost after its promotion
        ours = decision.promote and current is not None and current.content_id == ref.content_id
        if moved and not ours:
            serves = "no version" if current is None else f"version {current.number}"
            raise OutdatedPlanError(f"{self.line.name}: {serves} is the champion by now. {_PLAN_AGAIN}")
        version = lines.register(self.line.name, ref, tags, run_id=run_id)
        if self.line.upload and not version.uploaded:
            lines.upload(version, ref.path / DRAFTER_FOLDER, run_id)
        link_version(Tracking(home(), self.config.experiment), version, manifest)
        if not decision.promote:
            tag_refreshed(version)
            error = RefusedError(f"{version} is not promoted: {decision.outcome}")  # the screen has the reason
            name = "Inconclusive" if decision.outcome == "inconclusive" else "Refused"
            message = f"{version} is not promoted: {decision.sentence}"
            return self._conclusion(name, message, decision, version, error)
        at = f"{version.line}@{version.number}"
        if (rollback := lines.rollback_event(version)) is not None:  # the same inputs have made it again
            message = (
                f"{version} is not promoted: {rollback.by} took it out of service at {rollback.at} ({rollback.why}), "
                f"and its inputs have not changed since. To serve it: `draftsmith promote {at}`"
            )
            tag_refreshed(version)
            return self._conclusion("Refused", message, decision, version, RefusedError(message))
        if self.line.approve and CHAMPION not in version.aliases and not _approved(at):
            message = f"{version} waits for approval (registry.approve). To promote it: `draftsmith promote {at}`"
            tag_refreshed(version)
            return self._conclusion("Waiting", message, decision, version, RefusedError(message))
        return self._promote(version, expected, decision, tags)

    def _version_tags(self, folders: Mapping[str, Path], decision: GateDecision) -> dict[str, str]:
        evaluation = EvaluationResult.read(folders["evaluation"])
        settings = measured_with(self.config)
        tags = version_tags(evaluation, decision, folders[decision.challenger], self.config.prompts, settings)
        if evaluation.target_difference is not None:  # a drift check replays, so it compares with replay
            replayed = EvaluationResult.read(folders["evaluation"], EvaluationResult.ACCEPTANCE_FILE)
            replayed = replayed.model_copy(update={"speed": evaluation.speed})
            tags["figures"] = json.dumps(promotion_metrics(replayed, decision.challenger))
        tags |= log_tags(folders["logs"]) if "logs" in folders else {}
        return tags | ({"report": str(folders["report"] / "report.html")} if "report" in folders else {})

    def _promote(
        self, version: Version, expected: Version | None, decision: GateDecision, tags: Mapping[str, str]
    ) -> Conclusion:
        new_tags: dict[str, str] = {}
        # an earlier champion again has its metrics of today, unless another launcher of the same config promoted it
        if "promoted_at" in version.tags and CHAMPION not in version.aliases:
            new_tags = {name: tags[name] for name in PROMOTION_TAGS if name in tags}
        try:
            registry().promote(version, expected=expected, why=decision.sentence, tags=new_tags)
        except ChampionMovedError as error:
            raise OutdatedPlanError(f"{error} {_PLAN_AGAIN}") from error
        tag_refreshed(version)
        self._swap_servers()
        return self._conclusion("Promoted", f"{version} is the champion: {decision.sentence}", decision, version)

    def _swap_servers(self) -> None:
        """Have the servers of `registry.servers` draft with the champion. The conclusion names a failure."""
        champion = registry().champion(self.line.name) if self.line.servers else None
        if champion is None:
            return
        try:
            self._swapped, self._unserved = swap_in_run(champion, self.line.servers), None
        except DraftsmithError as error:
            self._swapped, self._unserved = f"swap failed: {error}", error

    def _with_servers(self, conclusion: Conclusion) -> Conclusion:
        """Return the conclusion with what happened to the servers: `Unserved` if that alone failed."""
        message = "; ".join(filter(None, [conclusion.message, self._swapped]))
        if conclusion.error is not None or self._unserved is None:
            return replace(conclusion, message=message)
        error = type(self._unserved)(message)
        return replace(conclusion, name=UNSERVED, message=message, error=error, overrules_review=True)

    def _conclusion(
        self,
        name: str,
        message: str,
        decision: GateDecision,
        version: Version,
        error: RefusedError | None = None,
    ) -> Conclusion:
        tags = {
            OUTCOME: name.lower(),
            VERSION: f"{version.line}@{version.number}",
            **({"rules": rules} if (rules := failed_rules(decision)) else {}),
            **self._drift_tags,
        }
        promoted = name == "Promoted"
        overrules = decision.promote and not promoted
        asset = f"draftsmith://line/{version.line}/champion" if promoted else ""
        metadata = {"version": version.number, "tau": float(version.tags["tau"]), "source": version.source}
        return self._with_servers(
            Conclusion(
                name,
                message,
                error,
                tags=tags,
                overrules_review=overrules,
                asset=asset,
                metadata=metadata,
            )
        )


def _approved(key: str) -> bool:
    from draftsmith.flows.orchestration.flow_run import approved  # imports Prefect, and planning must not

    return approved(key)


def _deployed() -> bool:
    from draftsmith.flows.orchestration.flow_run import deployed  # imports Prefect, and planning must not

    return deployed()


def _set_metrics(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, SetMetrics]:
    """Return the metrics of a promotion by slice."""
    return {name: SetMetrics.model_validate(metrics) for name, metrics in figures.items()}


def _describe(value: Any) -> str:
    return "left out" if value is None else f"{value}"


def resolve(config: RefreshConfig) -> RefreshConfig:
    """Return the config with the line's champion filled in, and with the time that `since: last` means."""
    if config.registry is None:
        return config
    check_held_out(config.registry.name, config.prompts)
    if config.registry.restart and _deployed():
        raise DraftsmithError(
            "registry.restart: a deployment's runs do not start a line again, since each would. Run the config once "
            "with `draftsmith run CONFIG --restart`."
        )
    line = with_current_champion(config.registry)
    if line.restart and line.champion is not None and config.sft.init_from == CHAMPION_WEIGHTS:
        raise DraftsmithError(
            f"--restart: it contradicts sft.init_from `champion`, which is version {line.champion.version}. Leave the "
            "option out, or change the field."
        )
    sections: dict[str, Config] = {"registry": line, "prompts": prompts_since(config.prompts, line.read_until)}
    if config.logs is not None and config.logs.since == LAST:
        sections["logs"] = config.logs.model_copy(update={"after": line.read_until})
    if config.logs is not None and not config.logs.replay_share and line.answers and not is_available(line.answers):
        # on a machine without the store: late rows are skipped, and the refresh goes on
        sections["registry"] = line.model_copy(update={"answers": None})
    return config.model_copy(update=sections)


def restarted(config: RunOptions) -> RefreshConfig:
    """Return the config of a refresh that starts its line again. Raises DraftsmithError if it names no line."""
    if not isinstance(config, RefreshConfig) or config.registry is None:
        raise DraftsmithError("--restart: the config names no model line (registry.name). Leave the option out.")
    return config.model_copy(update={"registry": config.registry.model_copy(update={"restart": True})})


def refresh_policy(config: RefreshConfig, force: Collection[str]) -> RefreshPolicy | None:
    """Return the policy of a refresh of a line; None without a registry."""
    return RefreshPolicy(config, force) if config.registry is not None else None


_MOST_NAMES = 5  # of slices in a sentence


def degraded_sets(now: Mapping[str, SetMetrics], then: Mapping[str, SetMetrics], threshold: float) -> list[str]:
    """Return the slices in which tau fell by more than `threshold` of what it was, in words; `all` for all prompts.

    now: of the drift check. then: at the promotion. Both have an error, as they come from different prompts; the single
    slices share theirs (Bonferroni), so that one is named in at most 5 % of checks where nothing fell.
    """
    comparable = [name for name in now if _is_comparable(name, now, then)]
    shared = 0.5 + simultaneous_level(sum(name != ALL for name in comparable)) / 2
    found = []
    for name in comparable:
        tau, high, tau_then, low_then = now[name].tau, now[name].high, then[name].tau, then[name].low
        assert tau is not None and high is not None and tau_then is not None and low_then is not None
        remaining = 1 - threshold
        reach = math.hypot(high - tau, remaining * (tau_then - low_then))
        fewest = min(each.prompts for each in (now[name], then[name]) if each.prompts is not None)
        single, wider = stdtrit(fewest - 1, [0.5 + CONFIDENCE / 2, shared])  # the wider tail for both errors
        if tau + reach * (1 if name == ALL else wider / single) < remaining * tau_then:
            was = f"{tau_then:.3f} at its promotion (at least {low_then:.3f})"
            found.append(f"{name}: tau {tau:.3f} (at most {high:.3f}), {was}")
    return found


def _is_comparable(name: str, now: Mapping[str, SetMetrics], then: Mapping[str, SetMetrics]) -> bool:
    """Return whether the slice was measured both times, on enough prompts."""
    return name in then and now[name].has_interval and then[name].has_interval


def inconclusive_sets(now: Mapping[str, SetMetrics], then: Mapping[str, SetMetrics]) -> list[str]:
    """Return the slices that `degraded_sets` cannot decide on, in words, by reason."""
    unknown = [name for name in now if name not in then or then[name].tau is None]
    few = [name for name in now if name not in unknown and not _is_comparable(name, now, then)]
    gone = [name for name in then if name not in now]
    return [
        f"inconclusive, {why}: {len(names)} slice{'s' * (len(names) != 1)} ({', '.join(names[:_MOST_NAMES])}"
        f"{', …' * (len(names) > _MOST_NAMES)})"
        for why, names in (
            ("not measured at its promotion", unknown),
            ("too few prompts", few),
            ("no longer among the prompts", gone),
        )
        if names
    ]
