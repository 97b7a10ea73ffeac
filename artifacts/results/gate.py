"""Results of stages `gate` and `report`: `decision.json`, `verdict.json` and `review.json`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from draftsmith.artifacts.results.base import Record, ResultFile

LOAD_RULES = ("speed at your load", "speed-up at your load")  # over the champion, and over decoding without a drafter
THE_CHAMPION = "the champion"  # in a sentence; `with_version` replaces it, since the version belongs to the line


class RuleResult(Record):
    """One rule of the gate and its result."""

    name: str
    passed: bool
    text: str  # with metrics and threshold
    # value; end of its interval; wanted: the threshold
    metrics: Mapping[str, int | float | None] = {}
    conclusive: bool = True  # False: the measurements neither support nor contradict it

    @property
    def broken(self) -> bool:
        """Return whether the measurements contradict the rule."""
        return self.conclusive and not self.passed

    @property
    def result(self) -> str:
        """Return `passed`, `failed` or `inconclusive`."""
        return "inconclusive" if not self.conclusive else "passed" if self.passed else "failed"


class GateDecision(ResultFile, Record):
    """The gate's decision about a challenger, with its reasons."""

    FILE: ClassVar[str] = "decision.json"

    promote: bool
    outcome: str  # promoted, refused or inconclusive
    challenger: str  # the arm
    champion: str | None = None  # None: there is none; else `champion`, or the number of its version
    sentence: str = ""
    rules: Sequence[RuleResult] = ()

    @property
    def failed(self) -> list[RuleResult]:
        """Return the rules that did not pass."""
        return [rule for rule in self.rules if not rule.passed]

    @property
    def at_load(self) -> RuleResult | None:
        """Return the rule on speed at the team's load that has metrics: if there are two, the one over the champion."""
        rules = {rule.name: rule for rule in self.rules if "tokens_per_s" in rule.metrics}
        return next((rules[name] for name in LOAD_RULES if name in rules), None)

    def with_version(self, version: int) -> GateDecision:
        """Return the decision with the champion's version number in place of "the champion".

        A stored decision has no number, since two lines may serve the same drafter.
        """
        if not self.champion:
            return self
        sentence = self.sentence.replace(THE_CHAMPION, f"version {version}", 1)
        return self.model_copy(update={"champion": str(version), "sentence": sentence})


class GateVerdict(ResultFile, Record):
    """The decision without metrics: the content of the artifact."""

    FILE: ClassVar[str] = "verdict.json"

    promote: bool
    challenger: str
    champion: bool
    rules: Mapping[str, bool]


class Outcome(Record):
    """The verdict of a report."""

    kind: str  # promoted, refused, inconclusive, or measured (without a gate)
    sentence: str
    reasons: Sequence[str] = ()
    followed: str | None = None  # the sentence of a promotion, once it is done
    label: str = ""


class ReviewResult(ResultFile, Record):
    """The fields of a report's review that other modules read."""

    FILE: ClassVar[str] = "review.json"

    outcome: Outcome
    speed_warnings: Sequence[str] = ()
    metrics: Mapping[str, float]
    config: Mapping[str, Mapping[str, Any]] = {}  # of every node
