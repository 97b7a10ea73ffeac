"""A refresh of a line continues after its drift check, or ends as current, with a reason."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.evaluation import ALL, EvaluationResult
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact
from draftsmith.artifacts.tracking.refresh_runs import OUTCOME
from draftsmith.artifacts.tracking.registry import CHAMPION, Registry
from draftsmith.artifacts.tracking.runs import Tracking
from draftsmith.flows.execution.display import Display
from draftsmith.flows.refresh import registry_commands
from draftsmith.flows.refresh.champion import history, resolve
from draftsmith.flows.refresh.drift import degraded_sets, inconclusive_sets, sticky_force
from draftsmith.flows.refresh.promotion import promotion_metrics
from draftsmith.flows.refresh.versions import registry
from draftsmith.stages.runtime.statistics import jackknife, ratio
from tests.benchmarks.slices import named_by_drift
from tests.flows.refresh.line_runs import checked, config_of, finished, gated
from tests.stages.evaluation.test_error_rates import allowed


def test_a_refresh_continues_if_forced_or_if_the_last_one_is_too_old(
    line: str, home: Path, drafters: list[Artifact]
) -> None:
    store = Store(home / "store")
    finished(config_of(line), gated(store, drafters[0]))

    def stops(force: tuple[str, ...] = (), restart: bool = False, **drift: float) -> str | None:
        config = resolve(config_of(line, drift=drift, registry={"name": line, "restart": restart}))
        ended = checked(config, home, force)
        assert ended is None or ended.tags[OUTCOME] == ended.name.lower(), "the tag in MLflow"
        return None if ended is None else ended.name

    (version,) = registry().versions(line)
    assert stops() == "Current"
    assert stops(force=("target",)) == "Current", "the target was made again, but may not have changed"
    assert stops(force=("drift",)) is None and stops(force=("evaluation",)) is None and stops(restart=True) is None
    resolved = resolve(config_of(line))
    for force, kept in (("drift", {"drift"}), ("evaluation", {"drift"}), ("target", set())):
        assert sticky_force(resolved, (force,)) == kept, "else the next run would find no reason to continue"
    assert registry().drift(line)[-1].decision == "the line starts again (--restart)"
    registry().tag(version, {"promoted_at": "2020-01-01T00:00:00+00:00"})
    assert stops() == "Current", "the last refresh counts, not the last promotion"
    registry().tag(version, {"refreshed_at": "2020-01-01T00:00:00+00:00"})
    assert stops() is None
    assert re.match(r"the last refresh was 2\d\d\d days ago, more than 90$", registry().drift(line)[-1].decision)
    registry().tag(version, {"refreshed_at": (datetime.now(UTC) - timedelta(hours=2)).isoformat()})
    assert stops(max_age_days=0.001) is None
    assert registry().drift(line)[-1].decision == "the last refresh was 0.083 days ago, more than 0.001"
    assert stops(max_age_days=36500) == "Current"
    config = resolve(config_of(line, drift={"max_age_days": 36500}))
    assert checked(config, home, target_changed=True) is None, "a changed target is a reason whatever tau is"
    assert registry().drift(line)[-1].decision == "the target has changed since its promotion"
    registry().tag(version, {"refreshed_at": "2120-01-01T00:00:00+00:00"})
    assert stops() is None, "a clock is wrong"
    assert "2120-01-01T00:00:00+00:00, which is ahead of" in registry().drift(line)[-1].decision
    finished(config_of(line), gated(store, drafters[1], "refused"))
    assert stops() == "Current", "a refused refresh counts, and replaces the tag of a wrong clock"


def test_drift_is_judged_by_replay_where_another_target_is_served(
    line: str, home: Path, drafters: list[Artifact]
) -> None:
    """Its tau is 2.6 as served, which servers are watched by, and 2.5 by replay, as in the drift check."""
    made = gated(Store(home / "store"), drafters[0], tau=2.6)
    evaluation, speed = made["evaluation"].path, {"opd": {"tokens_per_s": 100.0, "speedup": 1.2}}
    served = {"settings": ["quantization fp8"], "tokens": 9, "mean": 0.1, "largest": 0.7}
    content = json.loads((evaluation / "evaluation.json").read_text())
    (evaluation / "evaluation.json").write_text(json.dumps(content | {"target_difference": served, "speed": speed}))
    content["drafters"]["opd"] |= {"tau": 2.5, "tau_low": 2.4, "tau_high": 2.6}
    (evaluation / "acceptance.json").write_text(json.dumps(content | {"speed": {}}))
    finished(config_of(line), made)
    (version,) = registry().versions(line)
    figures = version.metrics()["all"]
    assert (figures["tau"], figures["low"], figures["speedup"]) == (2.5, 2.4, 1.2)
    assert (version.tags["tau"], json.loads(version.tags["tau_interval"])) == ("2.6000", [2.5, 2.7])


@pytest.mark.parametrize("lost", ["the alias", "the version"])
def test_a_line_whose_champion_was_deleted_in_mlflow_is_an_error(
    lost: str, line: str, home: Path, drafters: list[Artifact]
) -> None:
    """A new line would promote whatever beats decoding without a drafter."""
    for drafter in drafters:
        finished(config_of(line), gated(Store(home / "store"), drafter))
    client, _ = Tracking(home).connect()
    if lost == "the alias":
        client.delete_registered_model_alias(line, CHAMPION)
    else:
        client.delete_model_version(line, "2")
    last = 2 if lost == "the alias" else 1
    with pytest.raises(DraftsmithError, match=f"{line}: it has no champion.*`draftsmith promote {line}@{last}`"):
        resolve(config_of(line))
    again = resolve(config_of(line, registry={"name": line, "restart": True}))
    assert again.registry is not None and again.registry.champion is None
    registry_commands.promote(Display(), f"{line}@{last}", "", dry_run=False)
    champion = resolve(config_of(line)).champion
    assert champion is not None and champion.version == last


def test_taus_measured_with_other_settings_are_not_compared(line: str, home: Path, drafters: list[Artifact]) -> None:
    finished(config_of(line), gated(Store(home / "store"), drafters[0]))
    low = {"tau": 1.0, "low": 0.9, "high": 1.1, "prompts": 40}

    def decided(**sections: Any) -> str:
        config = resolve(config_of(line, **sections))
        checked(config, home, all=low)
        return str(registry().drift(line)[-1].decision)

    assert decided().startswith("all: tau 1.000"), "the settings are the same"
    shorter = {"splits": ["validation", "heldout"], "sampling": {"max_new_tokens": 256}}
    changed = "measured differently since its promotion: "
    assert decided(heldout=shorter) == f"{changed}heldout.sampling.max_new_tokens 256, was 512"
    assert decided(evaluation={"head_tokens": 64}) == f"{changed}drafting.head_tokens 64, was not set"
    (version,) = registry().versions(line)
    known = json.loads(version.tags["measured_with"])
    assert known.pop("heldout.sampling.top_k") == 0
    registry().tag(version, {"measured_with": json.dumps(known)})
    some = {**shorter, "sampling": {"top_k": 20}}
    assert decided(heldout=some).startswith("all: tau 1.000"), "the version is older than top_k"
    registry().tag(version, {"measured_with": ""})
    assert decided(heldout=shorter).startswith("all: tau 1.000"), "the version has no settings"


def test_a_tag_has_the_metrics_of_as_many_sets_as_it_holds() -> None:
    taus = {"tau": 3.0, "tau_low": 2.9, "tau_high": 3.1, "prompts": 300}
    set_metrics = {"tau": 3.0, "low": 2.9, "high": 3.1, "prompts": 10, "speedup": 1.25}

    def stored(sets: int) -> dict[str, dict[str, Any]]:
        named = {f"task{n}": {"opd": set_metrics} for n in range(sets)}
        metrics = promotion_metrics(EvaluationResult.model_validate({"drafters": {"opd": taus}, "sets": named}), "opd")
        assert len(json.dumps(metrics)) < 5000
        return metrics

    assert stored(30)["task29"] == set_metrics
    assert stored(70)["task69"] == {"tau": 3.0, "low": 2.9, "prompts": 10}, "only what a drift check reads"
    assert 70 < len(stored(500)) < 500


def test_history_places_a_version_at_its_last_measurement(
    line: str, home: Path, drafters: list[Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = gated(Store(tmp_path / "other" / "store"), drafters[0], tau=3.5)
    for made in (*(gated(Store(home / "store"), drafter) for drafter in drafters), again):
        finished(config_of(line), made)
    registry_commands.rollback(Display(), line, "it accepts nothing", dry_run=False)
    days = [event.model_copy(update={"at": f"2120-01-0{day}"}) for day, event in enumerate(registry().events(line), 1)]
    monkeypatch.setattr(Registry, "events", lambda _self, _line: days)
    points = [(point["at"], point["version"], point["tau"]) for point in history(line, registry().versions(line))]
    assert points == [("2120-01-02", 2, 2.5), ("2120-01-03", 1, 3.5)], "not at the rollback"


def now(tau: float, reach: float) -> SetMetrics:
    return SetMetrics(tau=tau, low=tau - reach, high=tau + reach, prompts=40)


FEW = SetMetrics(tau=1.0, low=None, high=None, prompts=1)
BEFORE = {"all": now(4.0, 0.01), "chat": now(3.0, 0.01), "code": now(5.0, 0.01)}


OF_MANY = {name: metrics.model_copy(update={"high": None}) for name, metrics in BEFORE.items()}  # only lower ends
FELL = "chat: tau 2.000 (at most 2.300), 3.000 at its promotion (at least 2.990)"


@pytest.mark.parametrize(
    ("drift", "before", "threshold", "named"),
    [
        ({"all": now(3.9, 0.05), "chat": now(2.0, 0.3), "code": now(4.9, 0.05)}, BEFORE, 0.03, [FELL]),
        ({"all": now(3.9, 0.05), "chat": now(2.0, 0.3)}, OF_MANY, 0.03, [FELL]),
        ({"all": now(3.5, 0.6)}, BEFORE, 0.03, []),
        ({"maths": now(1.0, 0.1)}, BEFORE, 0.03, []),  # unknown
        ({"all": FEW}, BEFORE, 0.03, []),
        ({"all": now(1.0, 0.1)}, {"all": FEW.model_copy(update={"tau": 4.0})}, 0.03, []),  # a single prompt then
        ({"all": now(3.7, 0.1)}, BEFORE, 0.03, ["all"]),
        ({"all": now(3.7, 0.1)}, BEFORE, 0.1, []),  # the threshold is a share of tau at the promotion
        # 0.5 below the limit, with 0.4 each: 0.57 together
        ({"all": now(3.38, 0.4)}, {"all": now(4.0, 0.01)}, 0.03, ["all"]),
        ({"all": now(3.38, 0.4)}, {"all": now(4.0, 0.4)}, 0.03, []),
    ],
)
def test_a_set_whose_tau_fell_measurably_is_named(
    drift: dict[str, SetMetrics], before: dict[str, SetMetrics], threshold: float, named: list[str]
) -> None:
    found = degraded_sets(drift, before, threshold)
    assert [text[: len(begin)] for text, begin in zip(found, named, strict=True)] == named


def test_inconclusive_sets_are_named_with_the_reason() -> None:
    gone = "inconclusive, no longer among the prompts: 1 slice (code)"
    assert inconclusive_sets({"all": now(3.5, 0.6), "chat": now(1.0, 0.1)}, BEFORE) == [gone]
    assert inconclusive_sets({"all": now(4.0, 0.1), "chat": FEW, **{f"task{n}": FEW for n in range(7)}}, BEFORE) == [
        "inconclusive, not measured at its promotion: 7 slices (task0, task1, task2, task3, task4, …)",
        "inconclusive, too few prompts: 1 slice (chat)",
        gone,
    ]
    assert inconclusive_sets({"all": now(4.0, 0.1)}, {"all": FEW}) == ["inconclusive, too few prompts: 1 slice (all)"]


def measured(rng: np.random.Generator, sets: int, prompts: int, share: float = 1.0) -> dict[str, SetMetrics]:
    """Return a drift check on new prompts, with tau times `share`."""
    tau = np.clip(np.exp(rng.normal(1.0, 0.3, (sets, prompts))) * share, 1.02, None)
    committed = rng.lognormal(5, 0.5, (sets, prompts))
    found = {}
    for name, places in {ALL: slice(None), **{f"set{n}": slice(n, n + 1) for n in range(sets)}}.items():
        estimate = jackknife(ratio, committed[places].ravel(), (committed / tau)[places].ravel())
        low, high = estimate.interval() or (None, None)
        found[name] = SetMetrics(tau=estimate.value, low=low, high=high, prompts=estimate.units)
    return found


@pytest.mark.parametrize(("sets", "prompts", "then", "seed"), [(10, 14, 14, 0), (20, 60, 3, 2)])
def test_no_set_is_named_where_nothing_changed(sets: int, prompts: int, then: int, seed: int) -> None:
    """By single intervals of only today's taus more than half of the first checks set off a refresh.

    By the tail of today's many prompts, one in seven of the second does: the promotion had few prompts.
    """
    rng, repetitions = np.random.default_rng(seed), 150
    alarms = [
        bool(degraded_sets(measured(rng, sets, prompts), measured(rng, sets, then), 0.0)) for _ in range(repetitions)
    ]
    assert sum(alarms) / repetitions <= allowed(repetitions)


def test_no_slice_is_named_where_nothing_changed() -> None:
    """Labels and depths overlap, and a depth may rest on few of its prompts."""
    assert named_by_drift(prompts=144, evaluations=80) <= allowed(80)


def test_a_fall_of_a_fifth_is_seen() -> None:
    rng, repetitions = np.random.default_rng(1), 50
    seen = [bool(degraded_sets(measured(rng, 10, 14, 0.8), measured(rng, 10, 14), 0.03)) for _ in range(repetitions)]
    assert sum(seen) / repetitions > 0.8
