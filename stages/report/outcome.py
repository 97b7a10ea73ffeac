"""What a refresh came to, in one sentence with its reason.

A report is written before anything follows from it: it says what the gate says, not what was done.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.stages.evaluation.gate_rules import CHAMPION, challenger_of
from draftsmith.stages.report.names import in_words, name_of, number

LABELS = {
    "promoted": "The gate says: promote",
    "refused": "Not promoted",
    "inconclusive": "Not promoted: inconclusive",
    "measured": "Measured, nothing to decide",
}
_LONGEST = 100  # characters of a reason in the sentence


@dataclass(frozen=True)
class Outcome:
    """The verdict of a report."""

    kind: str  # promoted, refused, inconclusive, measured (where no gate was asked)
    sentence: str
    reasons: Sequence[str]
    followed: str | None = None  # the sentence of a promotion, once it is done

    @property
    def label(self) -> str:
        return LABELS[self.kind]


def outcome(evaluation: Mapping[str, Any], decision: Mapping[str, Any]) -> Outcome | None:
    """Return the verdict; None where nothing was measured."""
    if not evaluation.get("drafters"):
        return None
    if not decision:
        return _measured(evaluation)
    kind, rules = decision["outcome"], decision["rules"]
    failed = [rule for rule in rules if not rule["passed"]]
    name, champion = name_of(decision["challenger"]), _champion(decision["champion"])
    lengths = f" (acceptance length {_lengths(evaluation, decision['challenger'])})" if champion else ""
    followed = None
    if kind == "promoted":
        is_to, does = ("take", "takes") if champion else ("be", "is")
        what = f"the place of {champion}" if champion else f"the line's first champion{_first(evaluation, decision)}"
        sentence, followed = f"{name} is to {is_to} {what}{lengths}.", f"{name} {does} {what}{lengths}."
        shown = [rule for rule in rules if rule["name"] == "tau" or rule["name"].startswith("speed")]
    elif kind == "refused":
        broken = [rule for rule in failed if rule["judged"]]
        others = f" (and {len(broken) - 1} more)" if len(broken) > 1 else ""
        stays = f"{champion[0].upper()}{champion[1:]} stays: " if champion else ""
        sentence, shown = f"{stays}{name} fails {': '.join(_why(broken[0]))}{others}.", failed
    else:
        rule, said = _why(failed[0])
        sentence, shown = f"{rule[0].upper()}{rule[1:]} could not be judged: {said}.", failed
    return Outcome(kind, sentence, [f"{rule_name(rule['name'])}: {rule['said']}" for rule in shown], followed)


def rule_name(rule: str) -> str:
    """Return what readers call a rule of the gate: `acceptance length on chat`."""
    return re.sub(r"^tau( of )?", lambda found: "acceptance length" + (" on " if found[1] else ""), rule)


def _champion(known: str | None) -> str | None:
    """By its number, where the line is known."""
    return known and ("the champion" if known == CHAMPION else f"version {known}")


def _why(rule: Mapping[str, Any]) -> tuple[str, str]:
    """The rule, and the start of what it says: all of it is among the reasons."""
    said = re.split(r"(?:not judged|inconclusive)[:,] ", rule["said"])[-1]
    said = re.sub(r" \([^)]*\)", "", said).partition("; ")[0]
    return rule_name(rule["name"]), textwrap.shorten(said, _LONGEST, placeholder=" …")


def _measured(evaluation: Mapping[str, Any]) -> Outcome:
    """The candidate beside what it is compared with first."""
    arm = challenger_of(evaluation)
    length = number((evaluation["drafters"].get(arm) or {}).get("tau"), ".2f")
    sentence = f"{name_of(arm)} has an acceptance length of {length}"
    for found in evaluation.get("verdicts") or ():
        if found["kind"] == "tau" and found["arm"] == arm:
            judged = {True: "significant", False: "not significant", None: "too few prompts to tell"}
            difference = f"{found['value']:+.2f} against {in_words(found['other'])}"
            return Outcome("measured", f"{sentence}, {difference} ({judged[found['different']]}).", [])
    return Outcome("measured", f"{sentence}.", [])


def _first(evaluation: Mapping[str, Any], decision: Mapping[str, Any]) -> str:
    """What it has passed with, where there is no champion to compare with."""
    values = {rule["name"]: (rule.get("figures") or {}).get("value") for rule in decision["rules"]}
    if values.get("speed-up") is not None:
        return f" (speed-up {values['speed-up']:.2f})"
    length = number((evaluation["drafters"].get(decision["challenger"]) or {}).get("tau"), ".2f")
    return f" (acceptance length {length})"


def _lengths(evaluation: Mapping[str, Any], arm: str, other: str = CHAMPION) -> str:
    one, before = ((evaluation["drafters"].get(each) or {}).get("tau") for each in (arm, other))
    return f"{number(one, '.2f')} against {number(before, '.2f')}"
