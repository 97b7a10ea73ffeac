"""The gate: whether a challenger takes the champion's place, rule by rule, from what an evaluation measured.

Every rule has its figures, its threshold and its verdict. A rule that says "better" needs evidence for it (the lower
end of a one-sided interval), a rule that says "not worse" is broken by evidence against it (the upper end); what cannot
be judged, because too little was measured or the figures cannot be (`doubts`), does not pass. The rules of one kind
share their error rate (Bonferroni): a challenger that is as good as the champion is promoted in at most 5 % of cases.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any

from pydantic import Field

from draftsmith.stages.evaluation.validity import (
    FEWEST_PROMPTS,
    NOISE,
    PROMPTS,
    TAU,
    TURNS,
    doubts_about,
    few_turns,
)
from draftsmith.stages.evaluation.verdicts import FEWEST_TURNS
from draftsmith.stages.runtime.stage import Config
from draftsmith.stages.runtime.statistics import CONFIDENCE, Estimate

CHAMPION, PLAIN = "champion", "plain"
_TIE_OF_FLOAT32 = 0.01  # logits that two orders of the same sums differ by at most
_THE_CHAMPION = "the champion"  # in a sentence: its number is the line's, not of what was measured


class GateConfig(Config):
    """What a challenger must show."""

    min_tau_gain: Annotated[
        float, Field(ge=0, description="share of the champion's tau that the challenger's must be above it, measurably")
    ] = 0.0
    max_set_loss: Annotated[
        float, Field(ge=0, le=1, description="share of tau that a single prompt set may lose, before it is measurable")
    ] = 0.02
    max_speed_loss: Annotated[
        float, Field(ge=0, le=1, description="share of the champion's speed that may be lost, before it is measurable")
    ] = 0.02
    min_speedup: Annotated[
        float, Field(ge=0, description="over plain decoding, which the challenger must be above, measurably")
    ] = 1.0
    judge_speed: Annotated[
        bool, Field(description="false: tau alone decides, where no speed can be measured that means anything")
    ] = True
    max_margin: Annotated[
        float,
        Field(
            ge=0, description="logits: outputs that part from plain decoding in the serving dtype do so at near-ties"
        ),
    ] = 1.0


@dataclass(frozen=True)
class Rule:
    """One rule and what became of it."""

    name: str
    passed: bool
    said: str  # in words, with figures and threshold
    # value, end: of its interval, wanted: the threshold
    figures: Mapping[str, float | None] = field(default_factory=dict)
    judged: bool = True  # false: what was measured says nothing of it, for or against; it does not pass


@dataclass(frozen=True)
class Decision:
    """What the gate says of a challenger."""

    challenger: str  # the arm
    champion: bool  # whether it was compared with one, or with plain decoding alone
    rules: tuple[Rule, ...]

    @property
    def promote(self) -> bool:
        return all(rule.passed for rule in self.rules)

    @property
    def outcome(self) -> str:
        """promoted; refused, where a rule is broken; inconclusive, where some cannot be judged and none is broken."""
        if self.promote:
            return "promoted"
        return "refused" if any(rule.judged and not rule.passed for rule in self.rules) else "inconclusive"

    def sentence(self) -> str:
        """One sentence for the terminal."""
        against = _THE_CHAMPION if self.champion else "plain decoding"
        if self.promote:
            tau = next((rule.said for rule in self.rules if rule.name in ("tau", "speed-up")), "")
            passed = "beats" if self._above else "passes against"
            return f"promoted: {self.challenger} {passed} {against} ({tau})"
        broken = "; ".join(f"{rule.name}: {rule.said}" for rule in self.rules if not rule.passed)
        told = "refused by the gate" if self.outcome == "refused" else "inconclusive"
        return f"{told}: {self.challenger} against {against}: {broken}"

    @property
    def _above(self) -> bool:
        """Whether passing the first comparison means being better: a threshold may be lower."""
        speed = next((rule.figures.get("wanted") for rule in self.rules if rule.name == "speed-up"), None)
        return self.champion or speed is None or speed >= 1

    def as_json(self) -> dict[str, Any]:
        return {
            "promote": self.promote,
            "outcome": self.outcome,
            "challenger": self.challenger,
            "champion": CHAMPION if self.champion else None,
            "sentence": self.sentence(),
            "rules": [asdict(rule) for rule in self.rules],
        }


def challenger_of(evaluation: Mapping[str, Any]) -> str:
    """The arm that wins on the validation split; where that was not replayed, the last training of a refresh."""
    arms = [arm for arm in evaluation["drafters"] if arm != CHAMPION]
    taus = evaluation.get("validation_tau") or {}
    if known := [arm for arm in arms if taus.get(arm) is not None]:
        return max(known, key=lambda arm: taus[arm])
    return "opd" if "opd" in arms else arms[-1]


def with_version(decision: Mapping[str, Any], version: int) -> dict[str, Any]:
    """A decision as JSON, of the line in which the champion has this number: two lines may serve the same drafter."""
    if not decision.get("champion"):
        return dict(decision)
    named = decision["sentence"].replace(_THE_CHAMPION, f"version {version}", 1)
    return {**decision, "champion": str(version), "sentence": named}


def decide(evaluation: Mapping[str, Any], config: GateConfig, checksums: Sequence[str] = ()) -> Decision:
    """checksums: what is wrong with the files of challenger or champion."""
    challenger = challenger_of(evaluation)
    rules = [_checksums(checksums), *_lossless(evaluation, config), *_parity(evaluation, challenger)]
    if CHAMPION in evaluation["drafters"]:
        rules += [_tau(evaluation, challenger, config), *_sets(evaluation, challenger, config)]
    if config.judge_speed:
        rules += _speed(evaluation, challenger, config)
    elif CHAMPION not in evaluation["drafters"]:
        measured = evaluation["drafters"][challenger]
        tau, low = measured["tau"], measured["tau_low"]
        said = f"{tau:.3f}{'' if low is None else f', at least {low:.3f}'}; above 1.000 wanted"
        figures = {"value": tau, "end": low, "wanted": 1.0}
        rules.append(Rule("tau", low is not None and low > 1, said, figures, judged=low is not None))
    return Decision(challenger, CHAMPION in evaluation["drafters"], tuple(rules))


def _checksums(problems: Sequence[str]) -> Rule:
    return Rule("checksums", not problems, "; ".join(problems) or "every file is as it was written")


def _lossless(evaluation: Mapping[str, Any], config: GateConfig) -> Iterator[Rule]:
    """Token for token in float32 where that was compared; in the serving dtype, outputs may part at near-ties alone."""
    exact = evaluation.get("exactness") or {}
    prompts, identical = exact.get("fp32_prompts") or 0, exact.get("fp32_identical") or 0
    if prompts:
        said = f"{identical} of {prompts} outputs in float32 equal plain decoding"
        yield Rule("lossless", identical == prompts, said, {"value": identical, "wanted": prompts})
    margin = exact.get("median_margin")
    if margin is not None:
        tie = min(config.max_margin, _TIE_OF_FLOAT32) if exact.get("serving_dtype") == "float32" else config.max_margin
        said = f"outputs part at a median margin of {margin:.3g} logits, at most {tie:g} is a near-tie"
        yield Rule("near-ties", margin <= tie, said, {"value": margin, "wanted": tie})
    if not prompts and margin is None:
        yield _lossless_as_served(exact, sampled=bool(evaluation.get("temperature")))


def _lossless_as_served(exact: Mapping[str, Any], *, sampled: bool) -> Rule:
    """By outputs in the serving dtype alone, of which it is not known how sure the target was where they part."""
    share, dtype = exact.get("identical_share"), exact.get("serving_dtype")
    if share is None and sampled:  # on servers: the distribution is the same, the numbers drawn are not
        return Rule("lossless", True, "sampled outputs cannot be compared token for token")
    if share is None:
        said = "no output was compared with plain decoding: set evaluation.exactness_prompts"
        return Rule("lossless", False, said)
    said = f"{share:.1%} of the outputs in {dtype} equal plain decoding"
    if share == 1 or dtype == "float32":
        return Rule("lossless", share == 1, said, {"value": share, "wanted": 1.0})
    said += ", and none was compared in float32: set evaluation.exactness_prompts"
    return Rule("lossless", False, said, {"value": share, "wanted": 1.0}, judged=False)


def _parity(evaluation: Mapping[str, Any], challenger: str) -> Iterator[Rule]:
    """Evaluation itself fails where a server drafts otherwise than replay; here its figures are written down."""
    figures = (evaluation.get("parity") or {}).get(challenger)
    if figures:
        known = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        yield Rule("parity", True, _parity_said(known), known)


def _parity_said(figures: Mapping[str, float]) -> str:
    said = []
    if "mismatch_share" in figures:
        said.append(f"{figures['mismatch_share']:.1%} of the served verify steps differ from replay's")
    if {"served_tau", "replayed_tau"} <= figures.keys():
        said.append(f"tau {figures['served_tau']:.3f}, by replay {figures['replayed_tau']:.3f}")
    return "; ".join(said) or "served as replay computes it"


def _tau(evaluation: Mapping[str, Any], challenger: str, config: GateConfig) -> Rule:
    (found,) = _compared(evaluation, "tau", challenger, CHAMPION, set=None)
    gain, low = _relative(found, 1 - CONFIDENCE)
    wanted = f"above {config.min_tau_gain:+.1%} wanted"
    if low is None or found["units"] < FEWEST_PROMPTS:
        prompts = f"{found['units']} prompt{'s' * (found['units'] != 1)}"
        said = f"{prompts} cannot tell ({gain:+.1%}, {wanted}): {FEWEST_PROMPTS} are needed"
        return Rule("tau", False, said, {"value": gain, "wanted": config.min_tau_gain}, judged=False)
    said = f"{gain:+.1%} of the champion's, at least {low:+.1%} at 95 %; {wanted}"
    return Rule("tau", low > config.min_tau_gain, said, {"value": gain, "end": low, "wanted": config.min_tau_gain})


def _sets(evaluation: Mapping[str, Any], challenger: str, config: GateConfig) -> Iterator[Rule]:
    found = [each for each in _compared(evaluation, "tau", challenger, CHAMPION) if each["set"] is not None]
    for each in found:
        gain, high = _relative(each, 1 - (1 - CONFIDENCE) / len(found))
        name, figures = f"tau of {each['set']}", {"value": gain, "end": high, "wanted": -config.max_set_loss}
        if high is None:  # of one prompt: no evidence against it, and none for it
            yield Rule(name, True, f"{gain:+.1%}, not judged: one prompt cannot tell", figures, judged=False)
            continue
        said = f"{gain:+.1%}, at most {high:+.1%}; not below {-config.max_set_loss:+.1%}"
        yield Rule(name, high >= -config.max_set_loss, said, figures)


def _speed(evaluation: Mapping[str, Any], challenger: str, config: GateConfig) -> Iterator[Rule]:
    """Above plain decoding at the first setting, and not measurably slower than the champion at any."""
    over_plain, *_ = _compared(evaluation, "speed", challenger, PLAIN)
    yield _speed_rule(evaluation, "speed-up", over_plain, config.min_speedup, better=True, of=1)
    found = list(_compared(evaluation, "speed", challenger, CHAMPION))
    for each in found:
        name = f"speed at temperature {each['temperature']:g}, {each['concurrency']} in flight"
        yield _speed_rule(evaluation, name, each, 1 - config.max_speed_loss, better=False, of=len(found))


def _speed_rule(
    evaluation: Mapping[str, Any], name: str, found: Mapping[str, Any], wanted: float, *, better: bool, of: int
) -> Rule:
    """found: an entry of `evaluation["compared"]`. of: rules that share the error rate."""
    estimate, arms = _estimate(found), (found["arm"], found["other"])
    value = math.exp(estimate.value)
    times = "times" if better else "times the champion's"
    reasons = doubts_about(evaluation, found, *arms, kinds=(PROMPTS, TURNS, TAU))
    if not reasons and estimate.units < FEWEST_TURNS:
        reasons = [few_turns(estimate.units)]
    elif not reasons and math.isnan(estimate.error):
        reasons = ["one conversation or prompt outweighs all others: raise evaluation.speed_prompts"]
    if not reasons:
        level = 1 - (1 - CONFIDENCE) / of
        end = math.exp(estimate.upper(1 - level) if better else estimate.upper(level))
        passed = end > wanted if better else end >= wanted
        if not passed:  # noise widens intervals: what passes in spite of it passes
            reasons = doubts_about(evaluation, found, *arms, kinds=(NOISE,))
    if reasons:
        said = f"{value:.3f} {times}, not judged: {'; '.join(reasons)}"
        return Rule(name, False, said, {"value": value, "wanted": wanted}, judged=False)
    said = f"{value:.3f} {times}, {'at least' if better else 'at most'} {end:.3f} at {100 * level:.3g} %"
    said += f"; {'above' if better else 'at least'} {wanted:.3f} wanted"
    return Rule(name, passed, said, {"value": value, "end": end, "wanted": wanted})


def _compared(
    evaluation: Mapping[str, Any], kind: str, arm: str, other: str, **fields: Any
) -> Iterator[Mapping[str, Any]]:
    for each in evaluation.get("compared") or ():
        wanted = {"kind": kind, "arm": arm, "other": other, **fields}
        if all(each.get(name) == value for name, value in wanted.items()):
            yield each


def _relative(found: Mapping[str, Any], level: float) -> tuple[float, float | None]:
    """Difference of tau as a share of the other's, and the end of its one-sided interval at `level`."""
    estimate = gain_of(found)
    return estimate.value, estimate.upper(level) if estimate.units >= 2 else None


def gain_of(found: Mapping[str, Any]) -> Estimate:
    """Of an entry on tau: the difference as a share of the other's tau, which has an error of its own."""
    return _estimate(found["gain"])


def _estimate(found: Mapping[str, Any]) -> Estimate:
    error = found["error"]
    return Estimate(found["value"], math.nan if error is None else error, found["units"], found["degrees"])


def interval_of(found: Mapping[str, Any]) -> tuple[float, float] | None:
    """Of an entry of `evaluation["compared"]`, at 95 %; None for a single unit."""
    return _estimate(found).interval()


def compared(kind: str, arm: str, other: str, estimate: Estimate, **fields: Any) -> dict[str, Any]:
    """An entry of `evaluation["compared"]`, ready for JSON: what the gate reads."""
    return {"kind": kind, "arm": arm, "other": other, **as_figures(estimate), **fields}


def as_figures(estimate: Estimate) -> dict[str, Any]:
    """Ready for JSON, which has no NaN."""
    error = None if math.isnan(estimate.error) else estimate.error
    return {"value": estimate.value, "error": error, "units": estimate.units, "degrees": estimate.degrees}
