"""What a refresh came to, in one sentence with its reason.

A report is written before anything follows from it: it says what the gate says, not what was done.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.stages.measure.gate import CHAMPION, challenger_of
from draftsmith.stages.reporting.names import in_words, name_of, number

LABELS = {
    "promoted": "The gate says: promote",
    "refused": "Not promoted",
    "inconclusive": "Not promoted: inconclusive",
    "measured": "Measured, nothing to decide",
}
_BROKEN = {
    "checksums": "has files that do not match their checksums",
    "lossless": "changes the target's outputs",
    "near-ties": "differs from decoding without a drafter where the target was sure",
    "tau": "has no significantly higher acceptance length",
    "speed-up": "is not significantly faster than no drafter",
}
_USUAL = {"tau": 0.0, "speed-up": 1.0}  # thresholds at which a rule asks for better, no more
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
        why = " and ".join(dict.fromkeys(_broken(rule) for rule in failed if rule["judged"]))
        stays = f"{champion[0].upper()}{champion[1:]} stays: " if champion else ""
        lengths = lengths.replace("acceptance length ", "") if why.endswith("acceptance length") else lengths
        sentence, shown = f"{stays}{name} {why}{lengths}.", failed
    else:
        why = "; ".join(_unclear(rule) for rule in failed[:1])
        sentence, shown = f"{why[:1].upper()}{why[1:]}.", failed
    return Outcome(kind, sentence, [f"{rule_name(rule['name'])}: {rule['said']}" for rule in shown], followed)


def rule_name(rule: str) -> str:
    """Return what readers call a rule of the gate: `acceptance length on chat`."""
    return re.sub(r"^tau( of )?", lambda found: "acceptance length" + (" on " if found[1] else ""), rule)


def _champion(known: str | None) -> str | None:
    """By its number, where the line is known."""
    return known and ("the champion" if known == CHAMPION else f"version {known}")


def _broken(broken: Mapping[str, Any]) -> str:
    rule, wanted = broken["name"], (broken.get("figures") or {}).get("wanted")
    if rule in _USUAL and wanted is not None and wanted != _USUAL[rule]:
        gain = "gain in acceptance length" if rule == "tau" else rule
        return f"does not significantly reach the {gain} that the gate asks for"
    for prefix, words in (("tau of ", "is significantly worse on "), ("speed at ", "is significantly slower at ")):
        if rule.startswith(prefix):
            return words + rule.removeprefix(prefix)
    return _BROKEN.get(rule, f"breaks the rule {rule}")


def _unclear(rule: Mapping[str, Any]) -> str:
    """The rule, and the start of why it could not be decided: all of it is among the reasons."""
    why = re.split(r"(?:not judged|inconclusive)[:,] ", rule["said"])[-1]
    why = re.sub(r" \([^)]*\)", "", why).partition("; ")[0]
    return f"{rule_name(rule['name'])} could not be judged: {textwrap.shorten(why, _LONGEST, placeholder=' …')}"


def _measured(evaluation: Mapping[str, Any]) -> Outcome:
    """The first verdict on the acceptance length of the candidate."""
    arm = challenger_of(evaluation)
    found = [v for v in evaluation.get("verdicts") or () if v["kind"] == "tau" and v["arm"] == arm]
    if not found:
        length = number((evaluation["drafters"].get(arm) or {}).get("tau"), ".2f")
        return Outcome("measured", f"{name_of(arm)} has an acceptance length of {length}.", [])
    verdict, other = found[0], in_words(found[0]["other"])
    if verdict["different"] is None:
        said = f"{name_of(arm)} cannot be told from {other} by {verdict['prompts']} held-out prompt"
    elif verdict["different"]:
        higher = "higher" if verdict["value"] > 0 else "lower"
        said = f"{name_of(arm)} has a significantly {higher} acceptance length than {other}"
    else:
        said = f"The acceptance length of {name_of(arm)} does not differ significantly from that of {other}"
    return Outcome("measured", f"{said}: {_lengths(evaluation, arm, verdict['other'])}.", [])


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
