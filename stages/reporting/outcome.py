"""What a refresh came to, so that it is understood in five seconds: one sentence, why, and the figures behind it.

A report is written before anything follows from it, and stays whatever does: it says what the gate says, not what was
done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.stages.measure.doubts import doubts_about
from draftsmith.stages.measure.gate import CHAMPION, PLAIN, challenger_of, gain_of
from draftsmith.stages.reporting.names import ABSENT, name_of
from draftsmith.stages.reporting.rows import number

LABELS = {
    "promoted": "The gate says: promote",
    "refused": "Not promoted",
    "inconclusive": "Not promoted: inconclusive",
    "measured": "Measured, nothing to decide",
}
_BROKEN = {
    "checksums": "has files that are not as they were written",
    "lossless": "changes what the target says",
    "near-ties": "parts from plain decoding where the target was sure",
    "tau": "has no measurably higher tau",
    "speed-up": "is not measurably faster than plain decoding",
}


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


@dataclass(frozen=True)
class Tile:
    """One figure that is read first."""

    label: str
    figure: str
    beside: str


def outcome(evaluation: Mapping[str, Any], decision: Mapping[str, Any]) -> Outcome | None:
    """None where nothing was measured."""
    if not evaluation.get("drafters"):
        return None
    if not decision:
        return _measured(evaluation)
    kind, rules = decision["outcome"], decision["rules"]
    failed = [rule for rule in rules if not rule["passed"]]
    name = name_of(decision["challenger"])
    champion = _champion(decision["champion"])
    against = f" (tau {_taus(evaluation, decision['challenger'])})" if champion else ""
    followed = None
    if kind == "promoted":
        is_to, does = ("take", "takes") if champion else ("be", "is")
        what = f"the place of {champion}" if champion else "the line's first champion"
        sentence, followed = f"{name} is to {is_to} {what}", f"{name} {does} {what}{against}."
        shown = [rule for rule in rules if rule["name"] == "tau" or rule["name"].startswith("speed")]
    elif kind == "refused":
        broken = [rule for rule in failed if rule["judged"]]
        why = " and ".join(dict.fromkeys(_broken(rule) for rule in broken))
        stays = f"{champion[0].upper()}{champion[1:]} stays: " if champion else ""
        sentence, shown = f"{stays}{name} {why}", failed
    else:
        than = champion or "plain decoding"
        sentence = f"What was measured does not say whether {name} is better than {than}"
        shown = failed
    return Outcome(kind, f"{sentence}{against}.", [f"{rule['name']}: {rule['said']}" for rule in shown], followed)


def _champion(known: str | None) -> str | None:
    """As a sentence says it: by its number, where the line is known."""
    return known and (name_of(CHAMPION) if known == CHAMPION else f"version {known}")


def _broken(broken: Mapping[str, Any]) -> str:
    rule, wanted = broken["name"], (broken.get("figures") or {}).get("wanted")
    if rule in _USUAL and wanted is not None and wanted != _USUAL[rule]:
        return f"has not measurably the {'gain in tau' if rule == 'tau' else rule} that is asked for"
    if rule.startswith("tau of "):
        return f"is measurably worse on {rule.removeprefix('tau of ')}"
    if rule.startswith("speed at "):
        return f"is measurably slower at {rule.removeprefix('speed at ')}"
    return _BROKEN.get(rule, f"breaks the rule {rule}")


_USUAL = {"tau": 0.0, "speed-up": 1.0}  # thresholds at which a rule asks for better, no more


def _measured(evaluation: Mapping[str, Any]) -> Outcome:
    """The first verdict on tau of the arm that was chosen."""
    arm = challenger_of(evaluation)
    taus = [v for v in evaluation.get("verdicts") or () if v["kind"] == "tau" and v["arm"] == arm]
    if not taus:
        return Outcome("measured", f"{name_of(arm)} has a tau of {number(_tau(evaluation, arm), '.3f')}.", [])
    verdict = taus[0]
    other = name_of(verdict["other"])
    if verdict["different"] is None:
        said = f"{name_of(arm)} cannot be judged against {other} by {verdict['prompts']} held-out prompt"
    elif verdict["different"]:
        said = f"{name_of(arm)} has a measurably {'higher' if verdict['value'] > 0 else 'lower'} tau than {other}"
    else:
        said = f"{name_of(arm)} does not differ measurably in tau from {other}"
    return Outcome("measured", f"{said}: {_taus(evaluation, arm, verdict['other'])}.", [])


def _tau(evaluation: Mapping[str, Any], arm: str) -> Any:
    return (evaluation["drafters"].get(arm) or {}).get("tau")


def _taus(evaluation: Mapping[str, Any], arm: str, other: str = CHAMPION) -> str:
    return f"{number(_tau(evaluation, arm), '.2f')} against {number(_tau(evaluation, other), '.2f')}"


def tiles(evaluation: Mapping[str, Any], seconds: float) -> list[Tile]:
    """The figures that are read first. seconds: wall time of everything that the refresh rests on."""
    if not evaluation.get("drafters"):
        return []
    arm = challenger_of(evaluation)
    drafter, speed = evaluation["drafters"][arm], (evaluation.get("speed") or {}).get(arm) or {}
    known = evaluation["drafters"]
    others = [name for name in dict.fromkeys((CHAMPION, *(drafter.get("differences") or {}))) if name in known]
    beside = ", ".join(f"{name_of(other)} {number(_tau(evaluation, other), '.3f')}" for other in others)
    ends = tuple(number(drafter.get(f"tau_{end}"), ".2f") for end in ("low", "high"))
    reach = ABSENT if ABSENT in ends else f"95 %: {ends[0]} to {ends[1]}"
    found = [Tile(f"tau of {name_of(arm)}", number(drafter.get("tau"), ".3f"), beside or reach)]
    if CHAMPION in evaluation["drafters"]:
        found += _gain(evaluation, arm)
    setting = {name: evaluation.get(name) for name in ("temperature", "concurrency")}
    doubted = "not to be relied on" if doubts_about(evaluation, setting, arm, PLAIN) else ""
    if "speedup" in speed:
        ends = tuple(number(speed.get(f"speedup_{end}"), ".2f") for end in ("low", "high"))
        reach = "" if ABSENT in ends else f"95 %: {ends[0]} to {ends[1]}"
        found.append(
            Tile("speed over plain decoding", f"{number(speed['speedup'], '.2f')} times", doubted or reach or ABSENT)
        )
        found.append(
            Tile("tokens per second", number(speed.get("tokens_per_s"), ".1f"), doubted or _beside_plain(evaluation))
        )
    if seconds:
        found.append(Tile("time of all stages", duration(seconds), "those that were reused included"))
    return found


def _beside_plain(evaluation: Mapping[str, Any]) -> str:
    rate = number((evaluation["speed"].get(PLAIN) or {}).get("tokens_per_s"), ".1f")
    return f"plain decoding {rate}"


def _gain(evaluation: Mapping[str, Any], arm: str) -> list[Tile]:
    for found in evaluation.get("compared") or ():
        wanted = {"kind": "tau", "arm": arm, "other": CHAMPION, "set": None}
        if all(found.get(name) == value for name, value in wanted.items()) and found["base"]:
            return [Tile("tau beside the champion's", f"{found['value'] / found['base']:+.1%}", _reach(found))]
    return []


def _reach(found: Mapping[str, Any]) -> str:
    ends = gain_of(found).interval()
    if ends is None:
        return f"{found['units']} prompt"
    return f"95 %: {ends[0]:+.1%} to {ends[1]:+.1%}"


def duration(seconds: float) -> str:
    """As people say it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
