"""One typed review of an evaluation and its gate: the final screen, `review.json` and the report are made from it.

Differences between variants have intervals that are adjusted for the number of comparisons (`EvaluationResult.
verdicts`); only these decide significance. Intervals of single variants are widened to the same level.

A report is written before anything is done: its outcome is the gate's decision, not the action.
"""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from scipy.special import stdtrit

from draftsmith.artifacts.results.base import Record
from draftsmith.artifacts.results.evaluation import CHAMPION, NATIVE, PLAIN, Acceptance, EvaluationResult, SpeedMetrics
from draftsmith.artifacts.results.gate import LOAD_RULES, GateDecision, Outcome, RuleResult
from draftsmith.stages.evaluation.speed_warnings import AGAIN
from draftsmith.stages.evaluation.verdicts import AGAINST_ALL, estimate_of
from draftsmith.stages.runtime.statistics import CONFIDENCE

NAMES = {
    PLAIN: "without a drafter",
    CHAMPION: "champion",
    NATIVE: "native head",
    "sft": "SFT",
    "opd": "SFT + OPD",
    "control": "SFT continued",
}
ABSENT = "—"


def name_of(arm: str) -> str:
    """Return the name of a variant; a variant of `draftsmith evaluate` keeps its name."""
    return NAMES.get(arm, arm)


def in_words(arm: str) -> str:
    """Return the name of a variant inside a sentence, after a preposition."""
    return {CHAMPION: "the champion", NATIVE: "the native head", PLAIN: "no drafter"}.get(arm, name_of(arm))


def target_name(source: str) -> str:
    """Return the name of a target without its path, or the organisation before it."""
    return source.rstrip("/").rpartition("/")[2]


def number(value: Any, form: str) -> str:
    """Return a formatted number, or `ABSENT` if it is not a number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ABSENT
    return format(value, form)


def interval(numbers: Iterable[Any], form: str) -> str:
    """Return a value with its low and high end in brackets, if known; a line may break before them.

    Ends of 100 or more have no decimals, so that a wide interval does not make a wide column.
    """
    wide = re.sub(r"\.\df$", ".0f", form)
    value, *ends = (number(bound, wide if bound is not None and abs(bound) >= 100 else form) for bound in numbers)
    return value if ABSENT in (value, *ends) else f"{value}\n[{', '.join(ends)}]"


def duration(seconds: float) -> str:
    """Return `12 s`, `6 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


MANY_LOOPS = 0.05  # share of the held-out answers at which loops cause a warning
_GROUPS = {"lossless": "lossless", "near-ties": "lossless", "tau": "acceptance", LOAD_RULES[1]: "speed-up"}
_LABELS = {
    "promoted": "The gate says: promote",
    "refused": "Not promoted",
    "inconclusive": "Not promoted: inconclusive",
    "measured": "Measured, nothing to decide",
}
_LONGEST = 100  # characters of a reason in the sentence


class Metric(Record):
    """A value with its interval, if known."""

    value: float
    low: float | None = None
    high: float | None = None

    def text(self, form: str) -> str:
        """Return the value and its interval, formatted."""
        return interval((self.value, self.low, self.high), form)


class MetricDifference(Metric):
    """A variant against another: acceptance length minus the other's, or speed as a factor of the other's."""

    significant: bool | None = None  # None: inconclusive, from too few measurements or unreliable speeds

    @property
    def mark(self) -> str:
        """Return the mark that a table has after the value."""
        return {True: "", False: " n.s.", None: " ?"}[self.significant]

    def text(self, form: str) -> str:
        """Return the value, its interval and its mark, formatted."""
        return super().text(form) + self.mark


class Variant(Record):
    """A drafter, or decoding without one."""

    arm: str
    name: str
    is_challenger: bool
    acceptance: Metric
    tokens_per_s: float | None
    speedup: Metric | None
    differences: Mapping[str, MetricDifference]  # differences of the acceptance length, by other variant
    speed_over: Mapping[str, MetricDifference]
    unreliable: bool  # whether its speed is


class Check(Record):
    """A rule of the gate as the screen shows it."""

    name: str
    group: str  # rules with one tick on the screen
    result: str  # passed, failed, inconclusive
    text: str

    @property
    def tick(self) -> str:
        """Return the result as one character."""
        return {"passed": "✓", "failed": "✗", "inconclusive": "?"}[self.result]


class Review(Record):
    """The results of an evaluation, and the decision of its gate."""

    outcome: Outcome
    challenger: str
    other: str | None  # the variant that all others are compared with
    level: float  # level of every interval
    comparisons: int
    variants: Sequence[Variant]
    checks: Sequence[Check]
    warnings: Sequence[str]  # about data and outputs
    speed_warnings: Sequence[str]
    more_prompts: int | None  # for the next run from `evaluation` after an inconclusive one; 0: the same
    exactness: Sequence[str]
    headline: str  # tokens/s before and after
    machine: str

    def ticks(self) -> list[tuple[str, str]]:
        """Return (tick, group) of the gate; the worst rule of a group counts."""
        ticks: dict[str, str] = {}
        for check in self.checks:
            ticks[check.group] = max(ticks.get(check.group, "✓"), check.tick, key="✓?✗".index)
        return [(tick, group) for group, tick in ticks.items()]


def review_of(evaluation: EvaluationResult, decision: GateDecision | None) -> Review:
    """Return the review of an evaluation and its gate."""
    challenger = decision.challenger if decision is not None else evaluation.challenger
    verdicts = evaluation.verdicts
    level = max([CONFIDENCE, *(verdict.level for verdict in verdicts)])
    others = [*AGAINST_ALL, *(verdict.other for verdict in verdicts)]
    return Review(
        outcome=outcome_of(evaluation, decision),
        challenger=challenger,
        other=next((other for other in others if other in evaluation.drafters and verdicts), None),
        level=level,
        comparisons=sum(verdict.different is not None for verdict in verdicts),
        variants=[_variant(arm, evaluation, challenger, level) for arm in (PLAIN, *evaluation.drafters)],
        checks=[_check(rule) for rule in decision.rules] if decision is not None else [],
        warnings=_warnings(evaluation),
        speed_warnings=_speed_warnings(evaluation),
        more_prompts=_more_prompts(evaluation, decision),
        exactness=exactness_sentences(evaluation),
        headline=_headline(evaluation, challenger, decision),
        machine=machine_text(evaluation),
    )


def _more_prompts(evaluation: EvaluationResult, decision: GateDecision | None) -> int | None:
    if any(warning.kind in AGAIN for warning in evaluation.speed_warnings):
        return 0
    look, rules = evaluation.look, decision.rules if decision is not None else ()
    undecided = any(rule.name == "speed-up" and not rule.conclusive for rule in rules)
    return look.prompts if undecided and look.number < look.of else None


def _variant(arm: str, evaluation: EvaluationResult, challenger: str, level: float) -> Variant:
    speed, unreliable = evaluation.speed.get(arm), arm != PLAIN and evaluation.is_unreliable(arm)
    differences: dict[str, dict[str, MetricDifference]] = {"tau": {}, "speed": {}}
    for verdict in evaluation.verdicts:
        if verdict.arm == arm:
            untrusted = verdict.kind == "speed" and (unreliable or evaluation.is_unreliable(verdict.other))
            differences[verdict.kind][verdict.other] = MetricDifference(
                value=verdict.value,
                low=verdict.low,
                high=verdict.high,
                significant=None if untrusted else verdict.different,
            )
    return Variant(
        arm=arm,
        name=name_of(arm),
        is_challenger=arm == challenger,
        acceptance=Metric(value=1.0) if arm == PLAIN else _acceptance(evaluation.drafters[arm], level),
        tokens_per_s=None if speed is None else speed.tokens_per_s,
        speedup=_speedup(arm, speed, evaluation, level),
        differences=differences["tau"],
        speed_over=differences["speed"],
        unreliable=unreliable,
    )


def _acceptance(drafter: Acceptance, level: float) -> Metric:
    """Return tau with its interval, widened from 95 % by Student's t."""
    value, low, high = drafter.tau, drafter.tau_low, drafter.tau_high
    if low is None or high is None:
        return Metric(value=value)
    degrees = drafter.tau_degrees or max(1, drafter.prompts - 1)
    wider = float(stdtrit(degrees, 0.5 + level / 2) / stdtrit(degrees, 0.5 + CONFIDENCE / 2))
    return Metric(value=value, low=value - wider * (value - low), high=value + wider * (high - value))


def _speedup(arm: str, speed: SpeedMetrics | None, evaluation: EvaluationResult, level: float) -> Metric | None:
    """Return the speed-up at the first setting, with an interval of this level."""
    if speed is None or speed.speedup is None:
        return Metric(value=1.0) if arm == PLAIN and speed is not None else None
    for verdict in evaluation.compared("speed", arm, PLAIN):
        at_first = (verdict.temperature, verdict.concurrency) == (evaluation.temperature, evaluation.concurrency)
        if at_first and (ends := estimate_of(verdict).interval(level)):
            return Metric(value=speed.speedup, low=math.exp(ends[0]), high=math.exp(ends[1]))
    return Metric(value=speed.speedup)


def _check(rule: RuleResult) -> Check:
    name = rule.name
    group = "slices" if name.startswith("tau of ") else "speed" if name.startswith("speed at ") else name
    return Check(name=rule_name(name), group=_GROUPS.get(group, group), result=rule.result, text=rule.text)


def _warnings(evaluation: EvaluationResult) -> list[str]:
    sentences = []
    exact = evaluation.exactness
    if exact.fp32_prompts and exact.fp32_identical != exact.fp32_prompts:
        sentences.append(
            f"Do not serve these drafters: in float32 only {exact.fp32_identical} of {exact.fp32_prompts} outputs "
            "equal decoding without a drafter."
        )
    if (share := evaluation.loop_share or 0.0) >= MANY_LOOPS:
        lengths = {name_of(arm): number(tau, ".2f") for arm, tau in evaluation.tau_without_loops.items()}
        without = ", ".join(f"{name} {length}" for name, length in lengths.items())
        sentences.append(
            f"{share:.0%} of the held-out answers loop (six tokens repeated three times or more). Acceptance lengths "
            f"without them: {without}."
        )
    if (share := evaluation.outside_nucleus_share or 0.0) > 0.001:
        sentences.append(
            f"{share:.1%} of the answers' tokens cannot be sampled with the stated top_p and top_k, so acceptance "
            "lengths may be wrong. Set logs.top_p and logs.top_k to the values that the service used."
        )
    return sentences


def _speed_warnings(evaluation: EvaluationResult) -> list[str]:
    several = len(evaluation.speed_by_setting) > 1
    sentences = []
    for warning in evaluation.speed_warnings:
        where = f" (at temperature {warning.temperature:g}, {warning.concurrency} in flight)" if several else ""
        sentences.append(f"{warning.text[:1].upper()}{warning.text[1:]}{where}.")
    return list(dict.fromkeys(sentences))


def exactness_sentences(evaluation: EvaluationResult) -> list[str]:
    """Return sentences about equality of outputs with the target's, and of serving with replay."""
    exactness = evaluation.exactness
    sentences = []
    if exactness.fp32_prompts:
        same = f"{exactness.fp32_identical} of {exactness.fp32_prompts} outputs"
        sentences.append(f"In float32, {same} equal decoding without a drafter, token for token.")
    if exactness.identical_share is not None:
        sentences.append(
            f"In {exactness.serving_dtype or 'the serving dtype'}, {exactness.identical_share:.1%} of the outputs do."
        )
    if (margin := exactness.median_margin) is not None:
        sentences.append(f"Where they differ, the token is {margin:.3g} logits below the target's best (median).")
    for arm, parity in (evaluation.parity or {}).items():
        if parity.served_steps is not None:
            text = f"{parity.different_steps} of {parity.served_steps} served verify steps differ from replay"
        else:
            text = f"acceptance length {parity.served_tau:.3f} as served, {parity.replayed_tau:.3f} in replay"
        sentences.append(f"{name_of(arm)}: {text}.")
    return sentences


def _headline(evaluation: EvaluationResult, challenger: str, decision: GateDecision | None) -> str:
    """Return `1 in flight: 61.3 → 91.7 tokens/s (+50 %); …`, from the champion or no drafter to the challenger.

    The speed at the team's load comes first.
    """
    parts = []
    if decision is not None and (rule := decision.at_load) is not None:
        factor, rate = rule.metrics["value"] or 1.0, rule.metrics["tokens_per_s"] or 0.0
        over = in_words(CHAMPION if rule.name == LOAD_RULES[0] else PLAIN)
        speeds = f"{_rate(rate / factor)} → {_rate(rate)} tokens/s ({factor - 1:+.0%} over {over})"
        how = "measured" if evaluation.load_is_measured else "predicted"
        parts.append(f"at your load, {how}: {speeds}")
    for table in evaluation.speed_by_setting:
        before = CHAMPION if CHAMPION in table.arms else PLAIN
        old, new = table.arms.get(before), table.arms.get(challenger)
        if old is not None and new is not None:
            speeds = f"{_rate(old.tokens_per_s)} → {_rate(new.tokens_per_s)} tokens/s"
            gain = f"{new.tokens_per_s / old.tokens_per_s - 1:+.0%} over {in_words(before)}"
            parts.append(f"{table.concurrency} in flight: {speeds} ({gain})")
    unreliable = ", unreliable" if parts and evaluation.is_unreliable(challenger) else ""
    return "; ".join(dict.fromkeys(parts)) + unreliable


def _rate(tokens_per_s: float) -> str:
    return f"{tokens_per_s:,.0f}" if tokens_per_s >= 100 else f"{tokens_per_s:.1f}"


def machine_text(evaluation: EvaluationResult) -> str:
    """Return `2 × NVIDIA H100`, or the number of CPU cores without a GPU."""
    machine = evaluation.machine
    gpus = [f"{count} × {name}" if count > 1 else name for name, count in Counter(machine.gpus).items()]  # noqa: RUF001
    return ", ".join(gpus) or (f"{machine.cores} CPU cores" if machine.cores else "")


def outcome_of(evaluation: EvaluationResult, decision: GateDecision | None) -> Outcome:
    """Return the verdict in one sentence with its reasons."""
    if decision is None:
        return _outcome("measured", _measured_sentence(evaluation))
    kind, failed = decision.outcome, decision.failed
    name, champion, followed = name_of(decision.challenger), decision.champion, None
    if champion:
        champion = "the champion" if champion == CHAMPION else f"version {champion}"
    if kind == "promoted":
        tau = evaluation.drafters[decision.challenger].tau
        if champion:
            lengths = f"{tau:.2f} against {evaluation.drafters[CHAMPION].tau:.2f}"
            verbs, what = ("take", "takes"), f"the place of {champion} (acceptance length {lengths})"
        else:
            speedup = next((rule.metrics.get("value") for rule in decision.rules if rule.name == "speed-up"), None)
            passed_with = f"acceptance length {tau:.2f}" if speedup is None else f"speed-up {speedup:.2f}"
            verbs, what = ("be", "is"), f"the line's first champion ({passed_with})"
        sentence, followed = f"{name} is to {verbs[0]} {what}.", f"{name} {verbs[1]} {what}."
        shown = [rule for rule in decision.rules if rule.name == "tau" or rule.name.startswith("speed")]
    elif kind == "refused":
        broken = [rule for rule in failed if rule.broken]
        others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        stays = f"{champion[0].upper()}{champion[1:]} stays: " if champion else ""
        sentence, shown = f"{stays}{name} fails {': '.join(_reason(broken[0]))}{others}.", failed
    else:
        rule_text, why = _reason(failed[0])
        sentence, shown = f"{rule_text[0].upper()}{rule_text[1:]} is inconclusive: {why}.", failed
    return _outcome(kind, sentence, [f"{rule_name(rule.name)}: {rule.text}" for rule in shown], followed)


def _outcome(kind: str, sentence: str, reasons: Sequence[str] = (), followed: str | None = None) -> Outcome:
    return Outcome(kind=kind, sentence=sentence, reasons=reasons, followed=followed, label=_LABELS[kind])


def rule_name(rule: str) -> str:
    """Return a rule of the gate in the readers' words: `acceptance length on chat`."""
    return re.sub(r"^tau( of )?", lambda match: "acceptance length" + (" on " if match[1] else ""), rule)


def _reason(rule: RuleResult) -> tuple[str, str]:
    """Return the rule's name, and the start of its text: the whole text is among the reasons."""
    text = re.split(r"inconclusive[:,] ", rule.text)[-1]
    text = re.sub(r" \([^)]*\)", "", text).partition("; ")[0]
    return rule_name(rule.name), textwrap.shorten(text, _LONGEST, placeholder=" …")


def _measured_sentence(evaluation: EvaluationResult) -> str:
    """Return the challenger's acceptance length next to that of the first arm it is compared with."""
    arm = evaluation.challenger
    sentence = f"{name_of(arm)} has an acceptance length of {evaluation.drafters[arm].tau:.2f}"
    for verdict in evaluation.verdicts:
        if verdict.kind == "tau" and verdict.arm == arm:
            results = {True: "significant", False: "not significant", None: "inconclusive: too few prompts"}
            difference = f"{verdict.value:+.2f} against {in_words(verdict.other)}"
            return f"{sentence}, {difference} ({results[verdict.different]})."
    return f"{sentence}."
