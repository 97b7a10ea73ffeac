"""One typed review of an evaluation and its gate: the final screen, `review.json` and the report are made from it.

Differences between variants have intervals that are adjusted for the number of comparisons (`evaluation["verdicts"]`),
and are significant by those alone. Intervals of a variant alone are widened to the same level.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.special import stdtrit

from draftsmith.stages.evaluation.gate_rules import CHAMPION, PLAIN, challenger_of
from draftsmith.stages.evaluation.validity import AGAIN
from draftsmith.stages.evaluation.verdicts import AGAINST_ALL
from draftsmith.stages.report.names import in_words, interval, name_of, number
from draftsmith.stages.report.outcome import Outcome, outcome, rule_name
from draftsmith.stages.runtime.statistics import CONFIDENCE, Estimate

MANY_LOOPS = 0.05  # of the held-out answers: from here on it is a warning
_GROUPS = {"lossless": "lossless", "near-ties": "lossless", "tau": "acceptance", "speed-up": "speed-up"}


@dataclass(frozen=True)
class Measured:
    """A figure with its interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, form: str) -> str:
        return interval((self.value, self.low, self.high), form)


@dataclass(frozen=True)
class Difference(Measured):
    """A variant beside another one: acceptance length minus the other's, or speed as a factor of the other's."""

    significant: bool | None = None  # None: too little was measured, or the speeds are unreliable

    @property
    def mark(self) -> str:
        return {True: "", False: " n.s.", None: " ?"}[self.significant]

    def text(self, form: str) -> str:
        return super().text(form) + self.mark


@dataclass(frozen=True)
class Variant:
    """A drafter, or decoding without one."""

    arm: str
    name: str
    candidate: bool
    acceptance: Measured | None
    tokens_per_s: float | None
    speedup: Measured | None
    differences: Mapping[str, Difference]  # of the acceptance length, by the other variant
    speed_over: Mapping[str, Difference]
    unreliable: bool  # its speed


@dataclass(frozen=True)
class Check:
    """A rule of the gate."""

    name: str
    group: str  # of rules that are one tick on the screen
    result: str  # passed, failed, inconclusive
    said: str

    @property
    def tick(self) -> str:
        return {"passed": "✓", "failed": "✗", "inconclusive": "?"}[self.result]


@dataclass(frozen=True)
class Review:
    """What an evaluation found, and what its gate says of it."""

    outcome: Outcome
    candidate: str
    other: str | None  # the variant that all are compared with
    level: float  # of every interval
    comparisons: int
    variants: Sequence[Variant]
    checks: Sequence[Check]
    warnings: Sequence[str]  # on data and outputs
    doubts: Sequence[str]  # why speeds are unreliable
    measured_again: bool  # by the next run: what this one measured says nothing
    exactness: Sequence[str]
    headline: str  # tokens/s before and after
    machine: str

    def ticks(self) -> list[tuple[str, str]]:
        """Return (tick, group) of the gate; the worst rule of a group counts."""
        found: dict[str, str] = {}
        for check in self.checks:
            found[check.group] = max(found.get(check.group, "✓"), check.tick, key="✓?✗".index)
        return [(tick, group) for group, tick in found.items()]


def review_of(evaluation: Mapping[str, Any], decision: Mapping[str, Any]) -> Review | None:
    """Return the review of `evaluation.json` and `decision.json` (empty without a gate); None if nothing was
    measured."""
    verdict = outcome(evaluation, decision)
    if verdict is None:
        return None
    drafters, speed = evaluation["drafters"], evaluation.get("speed") or {}
    candidate = decision.get("challenger") or challenger_of(evaluation)
    verdicts = evaluation.get("verdicts") or []
    level = max([CONFIDENCE, *(each["level"] for each in verdicts)])
    variants = [
        _variant(arm, evaluation, candidate, level)
        for arm in dict.fromkeys((PLAIN, *drafters, *speed))
        if arm in speed or arm in drafters
    ]
    others = [*AGAINST_ALL, *(each["other"] for each in verdicts)]
    return Review(
        verdict,
        candidate,
        next((other for other in others if other in drafters and verdicts), None),
        level,
        sum(each["different"] is not None for each in verdicts),
        variants,
        [_check(rule) for rule in decision.get("rules") or ()],
        _warnings(evaluation),
        _doubts(evaluation),
        any(doubt["kind"] in AGAIN for doubt in evaluation.get("doubts") or ()),
        exactness(evaluation),
        _headline(evaluation, candidate),
        machine(evaluation),
    )


def _variant(arm: str, evaluation: Mapping[str, Any], candidate: str, level: float) -> Variant:
    drafter = evaluation["drafters"].get(arm) or {}
    speed = (evaluation.get("speed") or {}).get(arm) or {}
    unreliable = arm != PLAIN and is_unreliable(evaluation, arm)
    found: dict[str, dict[str, Difference]] = {"tau": {}, "speed": {}}
    for each in evaluation.get("verdicts") or ():
        if each["arm"] == arm:
            doubted = each["kind"] == "speed" and (unreliable or is_unreliable(evaluation, each["other"]))
            significant = None if doubted else each["different"]
            found[each["kind"]][each["other"]] = Difference(each["value"], each["low"], each["high"], significant)
    acceptance = _acceptance(drafter, level) if arm != PLAIN else Measured(1.0)
    speedup = _speedup(arm, speed, evaluation, level)
    named = arm, name_of(arm), arm == candidate
    return Variant(*named, acceptance, speed.get("tokens_per_s"), speedup, found["tau"], found["speed"], unreliable)


def _acceptance(drafter: Mapping[str, Any], level: float) -> Measured | None:
    """Widened from 95 % by Student's t over prompts."""
    value, low, high = (drafter.get(name) for name in ("tau", "tau_low", "tau_high"))
    if value is None:
        return None
    if low is None or high is None:
        return Measured(value)
    degrees = max(1, drafter.get("prompts", 2) - 1)
    wider = float(stdtrit(degrees, 0.5 + level / 2) / stdtrit(degrees, 0.5 + CONFIDENCE / 2))
    return Measured(value, value - wider * (value - low), value + wider * (high - value))


def _speedup(arm: str, speed: Mapping[str, Any], evaluation: Mapping[str, Any], level: float) -> Measured | None:
    if speed.get("speedup") is None:
        return Measured(1.0) if arm == PLAIN and speed else None
    wanted: dict[str, Any] = {"kind": "speed", "arm": arm, "other": PLAIN}
    wanted |= {name: evaluation.get(name) for name in ("temperature", "concurrency")}
    for each in evaluation.get("compared") or ():
        if all(each.get(name) == value for name, value in wanted.items()) and each["error"] is not None:
            ends = Estimate(each["value"], each["error"], each["units"], each["degrees"]).interval(level)
            return Measured(speed["speedup"], *map(math.exp, ends or ()))
    return Measured(speed["speedup"])


def is_unreliable(evaluation: Mapping[str, Any], arm: str) -> bool:
    """Return whether the speed of a variant is doubted at the first setting."""
    setting = {name: evaluation.get(name) for name in ("temperature", "concurrency")}
    return any(
        all(doubt.get(name) == value for name, value in setting.items())
        and (not doubt.get("arms") or arm in doubt["arms"])
        for doubt in evaluation.get("doubts") or ()
    )


def _check(rule: Mapping[str, Any]) -> Check:
    name = rule["name"]
    group = "prompt sets" if name.startswith("tau of ") else "speed" if name.startswith("speed at ") else name
    result = "inconclusive" if not rule["judged"] else "passed" if rule["passed"] else "failed"
    return Check(rule_name(name), _GROUPS.get(group, group), result, rule["said"])


def _warnings(evaluation: Mapping[str, Any]) -> list[str]:
    found = []
    exact = evaluation.get("exactness") or {}
    if (prompts := exact.get("fp32_prompts")) and exact.get("fp32_identical") != prompts:
        found.append(
            f"Do not serve these drafters: in float32 only {exact.get('fp32_identical')} of {prompts} outputs equal "
            "decoding without a drafter."
        )
    if (share := evaluation.get("loop_share") or 0.0) >= MANY_LOOPS:
        lengths = {name_of(arm): number(tau, ".2f") for arm, tau in (evaluation.get("tau_without_loops") or {}).items()}
        without = ", ".join(f"{name} {length}" for name, length in lengths.items())
        found.append(
            f"{share:.0%} of the held-out answers loop (six tokens repeated three times or more). Acceptance lengths "
            f"without them: {without}."
        )
    if (share := evaluation.get("outside_nucleus_share") or 0.0) > 0.001:
        found.append(
            f"{share:.1%} of the answers' tokens cannot be sampled with the stated top_p and top_k, so acceptance "
            "lengths may be wrong. Set logs.top_p and logs.top_k to the values that the service used."
        )
    return found


def _doubts(evaluation: Mapping[str, Any]) -> list[str]:
    several = len(evaluation.get("speed_by_setting") or ()) > 1
    found = []
    for doubt in evaluation.get("doubts") or ():
        where = f" (at temperature {doubt['temperature']:g}, {doubt['concurrency']} in flight)" if several else ""
        found.append(f"{doubt['said'][:1].upper()}{doubt['said'][1:]}{where}.")
    return list(dict.fromkeys(found))


def exactness(evaluation: Mapping[str, Any]) -> list[str]:
    """Return sentences on outputs that equal the target's, and on serving that equals replay."""
    found = evaluation.get("exactness") or {}
    sentences = []
    if prompts := found.get("fp32_prompts"):
        same = found.get("fp32_identical")
        sentences.append(f"In float32, {same} of {prompts} outputs equal decoding without a drafter, token for token.")
    if (share := found.get("identical_share")) is not None:
        sentences.append(f"In {found.get('serving_dtype') or 'the serving dtype'}, {share:.1%} of the outputs do.")
    if (margin := found.get("median_margin")) is not None:
        sentences.append(f"Where they differ, the token is {margin:.3g} logits below the target's best (median).")
    for arm, parity in (evaluation.get("parity") or {}).items():
        if "served_steps" in parity:
            what = f"{parity['different_steps']} of {parity['served_steps']} served verify steps differ from replay"
        else:
            what = f"acceptance length {parity['served_tau']:.3f} as served, {parity['replayed_tau']:.3f} in replay"
        sentences.append(f"{name_of(arm)}: {what}.")
    return sentences


def points_of(evaluation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return every setting with its `arms`; the first alone where no other was measured."""
    if evaluation.get("speed_by_setting"):
        return list(evaluation["speed_by_setting"])
    setting = {name: evaluation.get(name) for name in ("temperature", "concurrency")}
    return [{**setting, "arms": evaluation["speed"]}] if evaluation.get("speed") else []


def _headline(evaluation: Mapping[str, Any], candidate: str) -> str:
    """`1 in flight: 61.3 → 91.7 tokens/s (+50 %); …`, from the champion's, or no drafter's, to the candidate's."""
    found = []
    for point in points_of(evaluation):
        arms = point["arms"]
        before = CHAMPION if CHAMPION in arms else PLAIN
        old, new = ((arms.get(arm) or {}).get("tokens_per_s") for arm in (before, candidate))
        if old and new:
            where = f"{point['concurrency']} in flight: " if point.get("concurrency") is not None else ""
            found.append(f"{where}{_rate(old)} → {_rate(new)} tokens/s ({new / old - 1:+.0%} over {in_words(before)})")
    unreliable = ", unreliable" if found and is_unreliable(evaluation, candidate) else ""
    return "; ".join(dict.fromkeys(found)) + unreliable


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}"


def machine(evaluation: Mapping[str, Any]) -> str:
    """Return `2 × NVIDIA H100`, or the number of CPU cores where there is no GPU."""
    found = evaluation.get("machine") or {}
    gpus = [f"{count} × {name}" if count > 1 else name for name, count in Counter(found.get("gpus") or ()).items()]  # noqa: RUF001
    return ", ".join(gpus) or (f"{found['cores']} CPU cores" if found.get("cores") else "")
