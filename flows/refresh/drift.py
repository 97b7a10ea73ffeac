"""The drift check of a refresh: whether the champion is current, or why the refresh continues."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scipy.special import stdtrit

from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.drafting import AdoptedChampion
from draftsmith.artifacts.results.evaluation import ALL, DriftResult
from draftsmith.artifacts.tracking.refresh_runs import OUTCOME
from draftsmith.flows.planning.plan import Conclusion, EarlyEnd
from draftsmith.flows.refresh.config import RefreshConfig, measured_with
from draftsmith.flows.refresh.versions import BLOCK_SIZE, registry
from draftsmith.stages.runtime.statistics import CONFIDENCE, simultaneous_level

_MAX_TAG_CHARS = 250
_BEFORE_DRIFT = ("target", "prompts", "heldout", "champion")  # inputs of the drift check
MAX_CLOCK_SKEW_DAYS = 1 / 24  # between two hosts


@dataclass(frozen=True)
class Drift:
    """A drift check, and why the refresh continues; without a reason the champion is current."""

    result: DriftResult
    reasons: list[str]

    @property
    def tags(self) -> dict[str, str]:
        """Return the tags of the refresh in MLflow."""
        return {"drift": "; ".join(self.reasons)[:_MAX_TAG_CHARS] or "none"}


def judge_drift(config: RefreshConfig, folders: Mapping[str, Path], asked: Collection[str]) -> Drift:
    """Judge the drift check of a refresh with a champion, and record it in the registry.

    folders: those of nodes `drift` and `champion`. asked: nodes of `--force` and `--from`. With `drift` or a later one,
    the refresh continues whatever tau is.
    """
    assert config.registry is not None and config.champion is not None
    line, drift = config.registry.name, DriftResult.read(folders["drift"])
    adopted = AdoptedChampion.read(folders["champion"])
    reasons = _reasons(config, asked, drift, target_changed=adopted.target_changed)
    decision = "; ".join(reasons)[:1000] or "current"
    check = {"version": config.champion.version, **drift.overall.to_json(), "decision": decision}
    registry().add_drift(line, {"at": datetime.now(UTC).isoformat(timespec="seconds"), **check})
    return Drift(drift, reasons)


def current(config: RefreshConfig, drift: Drift) -> Conclusion:
    """Return the conclusion of a refresh that ends after its drift check: the champion is current."""
    assert config.registry is not None and config.champion is not None
    champion, overall = config.champion, drift.result.overall
    before = (champion.figures.get("all") or {}).get("tau")
    notes = [
        f"no slice fell measurably by more than {config.drift.threshold:.1%}",
        *inconclusive_sets(drift.result.root, _set_metrics(champion.figures)),
        "nothing was trained (`--force drift` refreshes anyway)",
    ]
    message = (
        f"{config.registry.name}: the champion (version {champion.version}) is current: tau {overall.tau or 0.0:.3f} "
        f"on {overall.prompts} prompts, {'unknown' if before is None else format(before, '.3f')} at its promotion; "
        f"{'; '.join(notes)}"
    )
    tags = {OUTCOME: "current", **drift.tags}
    return Conclusion("Current", message, metrics={"tau.champion": overall.tau or 0.0}, tags=tags)


def early_end(config: RefreshConfig, asked: Collection[str], folders: Mapping[str, Path]) -> EarlyEnd | None:
    """Return the drift check, unless it is known to find a reason to continue. folders: those of reused artifacts."""
    if config.champion is None:
        return None
    known = {"drift", "champion"} <= folders.keys()
    drift = DriftResult.read(folders["drift"]) if known else None
    target_changed = known and AdoptedChampion.read(folders["champion"]).target_changed
    if _reasons(config, asked, drift, target_changed=target_changed):
        return None
    what = "not made: the champion is current (`--force drift` refreshes anyway)"
    return EarlyEnd("drift", what if known else "then, only if tau has fallen", certain=known)


def sticky_force(config: RefreshConfig, asked: Collection[str]) -> frozenset[str]:
    """Return the nodes that a continued run must force again, or its drift check would find nothing and end the run."""
    return frozenset({"drift"} if _asked_beyond(asked) and config.champion is not None else ())


def _asked_beyond(asked: Collection[str]) -> list[str]:
    return sorted(set(asked) - set(_BEFORE_DRIFT))


def _reasons(
    config: RefreshConfig, asked: Collection[str], drift: DriftResult | None, *, target_changed: bool
) -> list[str]:
    """Return why the refresh continues; empty if there is no reason. drift: None before the check."""
    line, champion, limits = config.registry, config.champion, config.drift
    assert line is not None and champion is not None
    reasons = [f"{name} is asked for (--force or --from)" for name in _asked_beyond(asked)]
    if line.restart:
        reasons.append("the line starts again (--restart)")
    if target_changed:
        reasons.append("the target has changed since its promotion")
    if (days := age_days(line.refreshed_at)) > limits.max_age_days:
        ago = f"{days:.0f}" if days >= 10 else f"{days:.2g}"  # never 0
        reasons.append(f"the last refresh was {ago} days ago, more than {limits.max_age_days:g}")
    if days < -MAX_CLOCK_SKEW_DAYS:
        reasons.append(f"the last refresh was at {line.refreshed_at}, which is ahead of this machine's clock")
    if changes := _changed_settings(config):  # taus that were measured differently do not show drift
        return [*reasons, f"measured differently since its promotion: {', '.join(changes)}"]
    fallen = degraded_sets(drift.root, _set_metrics(champion.figures), limits.threshold) if drift else []
    return reasons + fallen


def _changed_settings(config: RefreshConfig) -> list[str]:
    """Describe the settings that have changed since the champion was measured; none if they are unknown."""
    assert config.registry is not None
    now, stored = measured_with(config), config.registry.measured_with
    return [
        f"{name} {_describe(now[name])}, was {_describe(before)}"
        for name, before in stored.items()
        if now.get(name, before) != before and name != BLOCK_SIZE  # by default the trained one, as it was
    ]


def age_days(refreshed_at: str | None) -> float:
    """Return the days since a refresh; 0 if there was none, below `-MAX_CLOCK_SKEW_DAYS` if a clock is wrong."""
    if refreshed_at is None:
        return 0.0
    return (datetime.now(UTC) - datetime.fromisoformat(refreshed_at)).total_seconds() / 86400


def _describe(value: Any) -> str:
    return "not set" if value is None else f"{value}"


def _set_metrics(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, SetMetrics]:
    """Return the metrics of a promotion by slice."""
    return {name: SetMetrics.model_validate(metrics) for name, metrics in figures.items()}


_MOST_NAMES = 5  # slices that a sentence names


def degraded_sets(now: Mapping[str, SetMetrics], then: Mapping[str, SetMetrics], threshold: float) -> list[str]:
    """Return the slices in which tau fell by more than `threshold` of what it was, in words; `all` for all prompts.

    now: metrics of the drift check. then: metrics at the promotion. Both have an error, as they come from different
    prompts. The slices share the error rate (Bonferroni): at most 5 % of checks name a slice although nothing fell.
    """
    comparable = [name for name in now if _is_comparable(name, now, then)]
    shared = 0.5 + simultaneous_level(sum(name != ALL for name in comparable)) / 2
    fallen = []
    for name in comparable:
        tau, high, tau_then, low_then = now[name].tau, now[name].high, then[name].tau, then[name].low
        assert tau is not None and high is not None and tau_then is not None and low_then is not None
        remaining = 1 - threshold
        reach = math.hypot(high - tau, remaining * (tau_then - low_then))
        fewest = min(metrics.prompts for metrics in (now[name], then[name]) if metrics.prompts is not None)
        single, wider = stdtrit(fewest - 1, [0.5 + CONFIDENCE / 2, shared])  # the wider tail for both errors
        if tau + reach * (1 if name == ALL else wider / single) < remaining * tau_then:
            was = f"{tau_then:.3f} at its promotion (at least {low_then:.3f})"
            fallen.append(f"{name}: tau {tau:.3f} (at most {high:.3f}), {was}")
    return fallen


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
