"""Every figure of a report by one name, the same in every refresh: what MLflow can be searched for."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from draftsmith.stages.evaluation.gate_rules import CHAMPION, challenger_of, gain_of, interval_of
from draftsmith.stages.report.review import points_of

CHALLENGER = "challenger"
_GIVEN = ("logs",)  # stages whose answers were there before
_ENDS = {"tau": ("tau", "low", "high"), "speedup": ("speedup", "speedup_low", "speedup_high")}  # of a set's figures
_SPEED = (
    "speedup", "tokens_per_s", "tau_served", "draft_share", "verify_share", "draft_ms_per_step", "verify_ms_per_step",
    "identical_share", "request_tokens_per_s_median", "first_token_s_median", "first_token_s_p95",
)  # fmt: skip


def figures(
    evaluation: Mapping[str, Any],
    decision: Mapping[str, Any] | None = None,
    artifacts: Sequence[Mapping[str, Any]] = (),
    data: Mapping[str, Any] | None = None,
) -> dict[str, float]:
    """`tau.ARM`, `tau.ARM/SET`, `speedup.cCONCURRENCY.tTEMPERATURE` (the challenger's), `speedup.ARM.c….t…`,
    `speedup.ARM/SET` (at the first setting), `tau_gain` and `tau_gain/SET` (share of the champion's), all these with
    `.low` and `.high`; `accepted_share.ARM.OFFSET`, `accepted_length.ARM.LENGTH` (verify steps), `gate.RULE` (1:
    passed, 0: broken; absent where it could not be judged) with `.value`, `.end` and `.wanted`, `rules_broken`,
    `rules_unjudged`, `cost.…`, `data.…`. ARM is also `challenger`, the arm that the gate looked at.

    artifacts: of the lineage, with `name`, `duration_s` and `metrics`. data: what `prompts.json` and `logs.json` count.
    """
    found = dict(_all(evaluation, artifacts, data or {}))
    found |= dict(_of_gate(decision or {}))
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _of_gate(decision: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    rules = decision.get("rules") or ()
    if rules:
        yield "rules_broken", sum(rule["judged"] and not rule["passed"] for rule in rules)
        yield "rules_unjudged", sum(not rule["judged"] for rule in rules)
    for rule in rules:
        name = rule["name"].replace(",", "")  # no part of a metric's name
        if rule["judged"]:
            yield f"gate.{name}", float(rule["passed"])
        for figure, value in (rule.get("figures") or {}).items():
            yield f"gate.{name}.{figure}", value


def _all(
    evaluation: Mapping[str, Any], artifacts: Sequence[Mapping[str, Any]], data: Mapping[str, Any]
) -> Iterator[tuple[str, Any]]:
    drafters = evaluation.get("drafters") or {}
    if drafters:
        challenger = challenger_of(evaluation)
        for arm, each in drafters.items():
            for role in (arm, *((CHALLENGER,) if arm == challenger else ())):
                yield from _of_drafter(role, each, evaluation, arm)
        yield from _gains(evaluation, challenger)
        for point in points_of(evaluation):
            if point.get("concurrency") is not None:
                yield from _of_speed(point, challenger)
    yield "doubts", len(evaluation.get("doubts") or ())
    exact = evaluation.get("exactness") or {}
    for name in ("fp32_prompts", "fp32_identical", "identical_share", "median_margin"):
        yield f"exactness.{name}", exact.get(name)
    yield "loop_share", evaluation.get("loop_share")
    for arm, parity in (evaluation.get("parity") or {}).items():
        for name, value in parity.items():
            yield f"parity.{arm}.{name}", value
    yield "cost.wall_s", sum(each.get("duration_s") or 0.0 for each in artifacts)
    yield "cost.device_s", device_seconds(artifacts)
    for each in artifacts:
        yield f"cost.wall_s.{each['name']}", each.get("duration_s")
    for name, key in (("tokens", "response_tokens"), ("positions", "positions"), ("tflop", "tflop")):
        yield f"cost.{name}", sum(counted(each, key) or 0.0 for each in artifacts)
    yield from _numbers("data", data)


def _numbers(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _numbers(f"{name}.{key}", inner)
    else:
        yield name, value


def _of_drafter(role: str, each: Mapping[str, Any], evaluation: Mapping[str, Any], arm: str) -> Iterator[Any]:
    yield f"tau.{role}", each.get("tau")
    yield f"tau.{role}.low", each.get("tau_low")
    yield f"tau.{role}.high", each.get("tau_high")
    yield f"block_size.{role}", each.get("block_size")
    for offset, share in enumerate(each.get("acceptance_by_offset") or (), start=1):
        yield f"accepted_share.{role}.{offset}", share
    for other, difference in (each.get("differences") or {}).items():
        for end, suffix in (("value", ""), ("low", ".low"), ("high", ".high")):
            yield f"tau_minus.{other}.{role}{suffix}", difference.get(end)
    for length, steps in enumerate(each.get("accepted_histogram") or ()):
        yield f"accepted_length.{role}.{length}", steps
    yield f"tau_without_loops.{role}", each.get("tau_without_loops")
    for name, arms in (evaluation.get("sets") or {}).items():
        own = arms.get(arm) or {}
        for kind in ("tau", "speedup"):
            value, low, high = _ENDS[kind]
            yield f"{kind}.{role}/{name}", own.get(value)
            yield f"{kind}.{role}/{name}.low", own.get(low)
            yield f"{kind}.{role}/{name}.high", own.get(high)


def _gains(evaluation: Mapping[str, Any], challenger: str) -> Iterator[tuple[str, Any]]:
    for found in evaluation.get("compared") or ():
        if (found["arm"], found["other"]) != (challenger, CHAMPION):
            continue
        if found["kind"] == "tau" and found["base"]:
            where = "" if found["set"] is None else f"/{found['set']}"
            gain = gain_of(found)
            yield f"tau_gain{where}", gain.value
            for suffix, end in zip(("low", "high"), gain.interval() or (), strict=False):
                yield f"tau_gain{where}.{suffix}", end
        elif found["kind"] == "speed":
            yield f"speed_over_champion.{point_name(found)}", math.exp(found["value"])
            for suffix, end in zip(("low", "high"), interval_of(found) or (), strict=False):
                yield f"speed_over_champion.{point_name(found)}.{suffix}", math.exp(end)


def _of_speed(point: Mapping[str, Any], challenger: str) -> Iterator[tuple[str, Any]]:
    where = point_name(point)
    for arm, each in point["arms"].items():
        for name in _SPEED:
            ends = ("", "_low", "_high") if name == "speedup" else ("",)
            for end in ends:
                suffix = end.replace("_", ".")
                yield f"{name}.{arm}.{where}{suffix}", each.get(f"{name}{end}")
                if arm == challenger:
                    yield f"{name}.{where}{suffix}", each.get(f"{name}{end}")


def point_name(setting: Mapping[str, Any]) -> str:
    """`c16.t0`: requests in flight, and temperature."""
    return f"c{setting['concurrency']}.t{setting['temperature']:g}"


def device_seconds(artifacts: Sequence[Mapping[str, Any]]) -> float:
    """Wall time by the devices that a stage's config asks for."""
    return sum((each.get("duration_s") or 0.0) * _devices(each.get("config") or {}) for each in artifacts)


def _devices(config: Mapping[str, Any]) -> int:
    parallel = config.get("parallel") or {}
    launch = (config.get("engine") or {}).get("launch") or {}
    servers = 1 if "rounds" in config else launch.get("servers", 1)  # an evaluation runs one at a time
    return int(
        parallel.get("processes", 1) * parallel.get("nodes", 1)
        if parallel
        else servers * launch.get("tensor_parallel", 1) * launch.get("data_parallel", 1)
    )


def counted(artifact: Mapping[str, Any], figure: str) -> float | None:
    """What its stage has generated or trained: `response_tokens`, `positions` or `tflop`. None where it says nothing,
    and for tokens that production had generated."""
    if figure == "response_tokens" and artifact.get("stage") in _GIVEN:
        return None
    return (artifact.get("metrics") or {}).get(figure)
