"""Stage `gate`: the rules for a challenger to take the champion's place.

Every rule has metrics, a threshold and a result. A "better" rule needs evidence for it (the lower end of a
one-sided interval), and is broken by evidence against it (the upper end). A "not worse" rule is broken by evidence
against it, and passes without. A rule is inconclusive, and not passed, if its interval holds the threshold,
too little was measured, or the speeds cannot be trusted (`speed_warnings.py`). The rules of one kind share their
error rate (Bonferroni), and so do the looks at the speeds (`looks.py`): a challenger that is as good as the champion
is promoted in at most 5 % of cases.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Annotated

from pydantic import Field

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.results.evaluation import (
    CHAMPION,
    PLAIN,
    ArmComparison,
    EvaluationResult,
    Exactness,
    LoadPoint,
)
from draftsmith.artifacts.results.gate import LOAD_RULES, THE_CHAMPION, GateDecision, GateVerdict, RuleResult
from draftsmith.artifacts.store.local import Store
from draftsmith.artifacts.store.manifest import Artifact, read_manifest
from draftsmith.stages.evaluation.looks import decides, level_of, prompts_wanted
from draftsmith.stages.evaluation.speed_warnings import FEWEST_PROMPTS, NOISE, PROMPTS, TAU, TIMED_RUNS, few_runs
from draftsmith.stages.evaluation.verdicts import FEWEST_RUNS, at_loads, comparison, estimate_of, too_small
from draftsmith.stages.runtime.stage import Config, Stage, StageContext
from draftsmith.stages.runtime.statistics import CONFIDENCE, Estimate, simultaneous_level

_NO_DIFFERENCE = "no measurable difference"
_TIE = 1.0  # logits: the most by which the serving dtype's outputs differ from those without a drafter
_TIE_OF_FLOAT32 = 0.01  # the most by which two orders of the same sums differ


class GateConfig(Config):
    """The thresholds for a challenger."""

    min_tau_gain: Annotated[
        float, Field(ge=0, description="the challenger's tau must be measurably above the champion's by this share")
    ] = 0.0
    max_set_loss: Annotated[
        float,
        Field(
            ge=0,
            le=1,
            description="tolerated loss of tau on a slice (prompt set, label, depth); fails only if significant",
        ),
    ] = 0.02
    max_speed_loss: Annotated[
        float, Field(ge=0, le=1, description="tolerated loss of the champion's speed; fails only if significant")
    ] = 0.02
    min_speedup: Annotated[
        float,
        Field(ge=0, description="speed-up over decoding without a drafter that the challenger must measurably exceed"),
    ] = 1.0
    loads: Annotated[
        Mapping[Annotated[int, Field(ge=1)], Annotated[float, Field(gt=0)]] | None,
        Field(
            description="requests in flight, and their shares of the time. Speeds there must pass too, predicted "
            "(embedded engine) or measured (servers: only within the range of evaluation.concurrency)"
        ),
    ] = None
    judge_speed: Annotated[
        bool, Field(description="false: only tau decides, if no meaningful speed can be measured")
    ] = True


def run(ctx: StageContext, config: GateConfig) -> None:
    """Write `decision.json` and `verdict.json`. A refused challenger is not an error of the stage."""
    evaluation = EvaluationResult.read(ctx.inputs["evaluation"])
    arms = (evaluation.challenger, CHAMPION)
    problems = [problem for arm in arms if arm in ctx.inputs and (problem := _damage(ctx.inputs[arm])) is not None]
    decision = decide(evaluation, config, problems)
    decision.write(ctx.out)
    GateVerdict(
        promote=decision.promote,
        challenger=decision.challenger,
        champion=CHAMPION in ctx.inputs,
        rules={rule.name: rule.passed for rule in decision.rules},
    ).write(ctx.out)
    for rule in decision.rules:
        ctx.log(f"{rule.result}  {rule.name}: {rule.text}")
    ctx.log(decision.sentence)
    inconclusive = sum(not rule.conclusive for rule in decision.rules)
    broken = sum(rule.broken for rule in decision.rules)
    ctx.summary(promote=float(decision.promote), rules_broken=broken, rules_unjudged=inconclusive)


def _damage(folder: Path) -> str | None:
    """Return an error about the first damaged file of an artifact; None if there is none."""
    try:
        Store(folder.parents[1]).verify(Artifact(folder, read_manifest(folder)))
    except DraftsmithError as error:
        return str(error)
    return None


def decide(evaluation: EvaluationResult, config: GateConfig, damage: Sequence[str] = ()) -> GateDecision:
    """Decide about the challenger of an evaluation. damage: errors in the files of challenger or champion."""
    challenger = evaluation.challenger
    rules = [_rule("checksums", not damage, "; ".join(damage) or "every file is as it was written")]
    rules += [*_lossless(evaluation), *_parity(evaluation, challenger)]
    if evaluation.has_champion:
        rules += [_tau(evaluation, challenger, config), *_slices(evaluation, challenger, config)]
    if config.judge_speed:
        rules += _speed(evaluation, challenger, config)
        rules += _at_loads(evaluation, challenger, config)
    elif not evaluation.has_champion:
        rules.append(_tau_alone(evaluation, challenger))
    return _decision(challenger, CHAMPION if evaluation.has_champion else None, rules)


def _decision(challenger: str, champion: str | None, rules: Sequence[RuleResult]) -> GateDecision:
    """Return the decision that follows from the rules, with a sentence for the terminal.

    It is inconclusive if a rule is inconclusive and none is broken.
    """
    promote = all(rule.passed for rule in rules)
    outcome = "promoted" if promote else "refused" if any(rule.broken for rule in rules) else "inconclusive"
    other = THE_CHAMPION if champion else "the baseline"  # decoding without a drafter
    if promote:
        main = next((rule for rule in rules if rule.name in ("tau", "speed-up")), None)
        threshold = next((rule.metrics.get("wanted") for rule in rules if rule.name == "speed-up"), None)
        better = champion is not None or threshold is None or threshold >= 1  # a threshold may be lower
        verb = "beats" if better else "passes against"
        sentence = f"promoted: {challenger} {verb} {other} ({main.text if main else ''})"
    else:
        failed = "; ".join(f"{rule.name}: {rule.text}" for rule in rules if not rule.passed)
        label = "refused by the gate" if outcome == "refused" else "inconclusive, which is not a defect of the drafter"
        sentence = f"{label}: {challenger} against {other}: {failed}"
    return GateDecision(
        promote=promote, outcome=outcome, challenger=challenger, champion=champion, sentence=sentence, rules=rules
    )


def _rule(
    name: str,
    passed: bool,
    text: str,
    metrics: Mapping[str, int | float | None] | None = None,
    conclusive: bool = True,
) -> RuleResult:
    """Return a rule's result. metrics: value, end (of its interval) and wanted (the threshold)."""
    return RuleResult(name=name, passed=passed, text=text, metrics=metrics or {}, conclusive=conclusive)


def _lossless(evaluation: EvaluationResult) -> Iterator[RuleResult]:
    """Check outputs token for token in float32; in the serving dtype they may differ only at near-ties."""
    exact = evaluation.exactness
    prompts, identical = exact.fp32_prompts or 0, exact.fp32_identical or 0
    if prompts:
        text = f"{identical} of {prompts} outputs in float32 equal decoding without a drafter"
        yield _rule("lossless", identical == prompts, text, {"value": identical, "wanted": prompts})
    margin = exact.median_margin
    if margin is not None:
        exactly = exact.serving_dtype == "float32" and evaluation.target_difference is None
        tie = _TIE_OF_FLOAT32 if exactly else _TIE
        text = f"outputs differ at a median margin of {margin:.3g} logits, at most {tie:g} is a near-tie"
        yield _rule("near-ties", margin <= tie, text, {"value": margin, "wanted": tie})
    if not prompts and margin is None:
        yield _lossless_as_served(exact, sampled=bool(evaluation.temperature))


def _lossless_as_served(exact: Exactness, *, sampled: bool) -> RuleResult:
    """Check outputs only in the serving dtype, without the target's certainty where they differ."""
    share, dtype = exact.identical_share, exact.serving_dtype
    if share is None and sampled:  # on servers: the distribution is the same, the random numbers are not
        return _rule("lossless", True, "sampled outputs cannot be compared token for token")
    if share is None:
        text = "no output was compared with decoding without a drafter: set evaluation.exactness_prompts"
        return _rule("lossless", False, text)
    text = f"{share:.1%} of the outputs in {dtype} equal decoding without a drafter"
    if share == 1 or dtype == "float32":
        return _rule("lossless", share == 1, text, {"value": share, "wanted": 1.0})
    text += ", and none was compared in float32: set evaluation.exactness_prompts"
    return _rule("lossless", False, text, {"value": share, "wanted": 1.0}, conclusive=False)


def _parity(evaluation: EvaluationResult, challenger: str) -> Iterator[RuleResult]:
    """Record parity: the evaluation already fails if a server drafts differently from replay."""
    if (parity := (evaluation.parity or {}).get(challenger)) is not None:
        text = f"tau {parity.served_tau:.3f}, by replay {parity.replayed_tau:.3f}"
        if parity.mismatch_share is not None:
            text = f"{parity.mismatch_share:.1%} of the served verify steps differ from replay's; {text}"
        yield _rule("parity", True, text, parity.model_dump(exclude_none=True))


def _tau(evaluation: EvaluationResult, challenger: str, config: GateConfig) -> RuleResult:
    (overall,) = (pair for pair in evaluation.compared("tau", challenger, CHAMPION) if pair.set is None)
    assert overall.gain is not None
    estimate = estimate_of(overall.gain)
    gain, low = estimate.value, estimate.upper(1 - CONFIDENCE)
    condition = f"above {config.min_tau_gain:+.1%} wanted{', as served' * (evaluation.target_difference is not None)}"
    if overall.units < FEWEST_PROMPTS:
        prompts = f"{overall.units} prompt{'s' * (overall.units != 1)}"
        text = f"{prompts} are too few ({gain:+.1%}, {condition}): {FEWEST_PROMPTS} are needed"
        return _rule("tau", False, text, {"value": gain, "wanted": config.min_tau_gain}, conclusive=False)
    better = decides(estimate, config.min_tau_gain, CONFIDENCE)
    text = f"{gain:+.1%} of the champion's, {_end(better, low, estimate.upper(), '+.1%')} at 95 %; {condition}"
    metrics = {"value": gain, "end": low, "wanted": config.min_tau_gain}
    if better is None:
        text = f"{text}, inconclusive: {_NO_DIFFERENCE}"
    return _rule("tau", better is True, text, metrics, conclusive=better is not None)


def _tau_alone(evaluation: EvaluationResult, challenger: str) -> RuleResult:
    """Check that drafting helps at all, if there is no champion and speed is not judged."""
    drafter = evaluation.drafters[challenger]
    tau, low, high = drafter.tau, drafter.tau_low, drafter.tau_high
    text = f"{tau:.3f}{'' if low is None else f', at least {low:.3f}'}; above 1.000 wanted"
    metrics = {"value": tau, "end": low, "wanted": 1.0}
    undecided = low is None or high is None or low <= 1 < high
    return _rule("tau", low is not None and low > 1, text, metrics, conclusive=not undecided)


def _slices(evaluation: EvaluationResult, challenger: str, config: GateConfig) -> Iterator[RuleResult]:
    """Check that no slice loses tau: a prompt set, a label or a depth."""
    gains = {
        comparison.set: estimate_of(comparison.gain)
        for comparison in evaluation.slices(challenger)
        if comparison.gain is not None
    }
    level = simultaneous_level(sum(not too_small(gain) for gain in gains.values()))
    for slice_name, gain in gains.items():
        name, lowest = f"tau of {slice_name}", -config.max_set_loss
        if reason := too_small(gain):  # no evidence against it, and none for it
            metrics = {"value": gain.value, "end": None, "wanted": lowest}
            yield _rule(name, True, f"{gain.value:+.1%}, inconclusive: {reason}", metrics, conclusive=False)
            continue
        high = gain.upper(level)
        text = f"{gain.value:+.1%}, at most {high:+.1%}; not below {lowest:+.1%}"
        yield _rule(name, high >= lowest, text, {"value": gain.value, "end": high, "wanted": lowest})


def _speed(evaluation: EvaluationResult, challenger: str, config: GateConfig) -> Iterator[RuleResult]:
    """Check for a gain over the baseline at the first setting, and no loss to the champion at any."""
    over_plain, *_ = evaluation.compared("speed", challenger, PLAIN)
    look_level = level_of(evaluation.look)
    yield _speed_rule(evaluation, "speed-up", over_plain, config.min_speedup, look_level, [over_plain.concurrency])
    over_champion = evaluation.compared("speed", challenger, CHAMPION)
    for setting in over_champion:
        name = f"speed at temperature {setting.temperature:g}, {setting.concurrency} in flight"
        level = simultaneous_level(len(over_champion), look_level)
        yield _speed_rule(evaluation, name, setting, 1 - config.max_speed_loss, level, [setting.concurrency])


def _at_loads(evaluation: EvaluationResult, challenger: str, config: GateConfig) -> Iterator[RuleResult]:
    """Check the speeds at the config's requests in flight; if measured, the speed warnings there count too."""
    others = [PLAIN, *([CHAMPION] if evaluation.has_champion else [])]
    for other in others if config.loads else ():
        threshold = config.min_speedup if other == PLAIN else 1 - config.max_speed_loss
        curve = evaluation.load_curve(challenger, other)
        name = LOAD_RULES[other == PLAIN]
        speeds = at_loads(curve, config.loads or {})
        if speeds is None:
            numbers = [point.concurrency for point in curve]
            timed, remedy = f"steps were timed with up to {max(numbers, default=0)}", "raise evaluation.speed_prompts"
            if evaluation.load_is_measured:
                timed = f"servers were timed with {', '.join(map(str, numbers))}"
                remedy = "add them to evaluation.concurrency"
            text = f"inconclusive: {timed} requests in flight; remove other loads from gate.loads, or {remedy}"
            yield _rule(name, False, text, {"wanted": threshold}, conclusive=False)
            continue
        estimate, tokens_per_s = speeds
        speed = comparison("speed", (challenger, other), estimate, temperature=evaluation.temperature)
        settings = _around(curve, config.loads or {}) if evaluation.load_is_measured else []
        rule = _speed_rule(evaluation, name, speed, threshold, level_of(evaluation.look), settings)
        more = {"tokens_per_s": tokens_per_s} if rule.conclusive else {}
        yield rule.model_copy(update={"metrics": {**rule.metrics, **more}})


def _around(curve: Sequence[LoadPoint], loads: Iterable[int]) -> list[int]:
    """Return the requests in flight of the points at or around the loads."""
    numbers = [point.concurrency for point in curve]
    below = {numbers[bisect_right(numbers, load) - 1] for load in loads}
    return sorted(below | {numbers[bisect_left(numbers, load)] for load in loads})


def _speed_rule(
    evaluation: EvaluationResult,
    name: str,
    speed: ArmComparison,
    wanted: float,
    level: float,
    in_flight: Sequence[int | None],
) -> RuleResult:
    """Check one comparison of speeds: better than without a drafter, or not worse than the champion.

    in_flight: requests in flight of the settings whose speed warnings concern it.
    """

    def warnings(*kinds: str) -> list[str]:
        arms = (speed.arm, speed.other)
        warned = [evaluation.warnings_about(speed.temperature, number, arms, kinds) for number in in_flight]
        return list(dict.fromkeys(chain.from_iterable(warned)))

    estimate, better = estimate_of(speed), speed.other == PLAIN
    value = math.exp(estimate.value)
    times = "times" if better else "times the champion's"
    reasons = warnings(PROMPTS, TIMED_RUNS, TAU)
    if not reasons and estimate.units < FEWEST_RUNS:
        reasons = [few_runs(estimate.units)]
    elif not reasons and math.isnan(estimate.error):
        reasons = ["one conversation or prompt outweighs all others: raise evaluation.speed_prompts"]
    low, high = math.exp(estimate.upper(1 - level)), math.exp(estimate.upper(level))
    logarithm = math.log(wanted) if wanted else -math.inf
    passed = None if reasons else decides(estimate, logarithm, level) if better else high >= wanted
    if not reasons and not passed:  # noise widens intervals: a rule that passes despite it passes
        reasons = warnings(NOISE)
    if reasons:
        text = f"{value:.3f} {times}, inconclusive: {'; '.join(reasons)}"
        return _rule(name, False, text, {"value": value, "wanted": wanted}, conclusive=False)
    text = f"{value:.3f} {times}, {_end(passed if better else False, low, high, '.3f')} at {100 * level:.4g} %"
    text += f"; {'above' if better else 'at least'} {wanted:.3f} wanted"
    metrics = {"value": value, "end": low if better else high, "wanted": wanted}
    if passed is None:
        text = f"{text}, inconclusive: {_more_prompts(evaluation, name, estimate, logarithm)}"
    return _rule(name, passed is True, text, metrics, conclusive=passed is not None)


def _end(better: bool | None, low: float, high: float, form: str) -> str:
    """Return the ends of a rule's interval as text. better: the result; None: the interval shows nothing."""
    if better is None:
        return f"from {low:{form}} to {high:{form}}"
    return f"at least {low:{form}}" if better else f"at most {high:{form}}"


def _more_prompts(evaluation: EvaluationResult, name: str, estimate: Estimate, wanted: float) -> str:
    """Return the number of further prompts that would decide, if further looks can measure them."""
    look = evaluation.look
    if name != "speed-up" or look.number == look.of:
        return _NO_DIFFERENCE
    following = look.model_copy(update={"number": look.number + 1})
    more = prompts_wanted(estimate, wanted, level_of(following)) - estimate.units
    left = (look.of - look.number) * look.prompts
    about = f"about {max(1, math.ceil(more))} more prompts" if more <= left else f"more than {left} more prompts"
    return f"{about} would decide at this spread"


STAGE = Stage(
    name="gate",
    config=GateConfig,
    inputs=("evaluation", "champion?", "sft", "opd?", "control?"),
    body="draftsmith.stages.evaluation.gate",
    volatile=("metrics.jsonl", GateDecision.FILE),
    reads_volatile=("evaluation",),
)
