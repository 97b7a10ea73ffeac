"""The content of `evaluation.json` as tables and sentences: terminal and page only draw them.

Every cell is finished text; a line break in a cell is where it may be broken. Figures that are not there are `ABSENT`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.stages.measure.gate import CHAMPION, challenger_of
from draftsmith.stages.reporting.names import ABSENT, name_of


@dataclass(frozen=True)
class Table:
    """A table as it is read."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""
    text_columns: int = 1  # the first ones hold words, the others figures


@dataclass(frozen=True)
class Arm:
    """Plain decoding or a drafter, with its figures of acceptance and of speed; either may be empty."""

    name: str
    drafter: Mapping[str, Any]
    speed: Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """A heading, and the cell below it of an arm."""

    heading: str
    cell: Callable[[Arm], str]


def number(value: Any, form: str) -> str:
    """A figure, or `ABSENT` if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ABSENT
    return format(value, form)


def interval(value: Any, low: Any, high: Any, form: str) -> str:
    """A figure, and its interval in brackets where there is one."""
    text = number(value, form)
    if ABSENT in (text, number(low, form), number(high, form)):
        return text
    return f"{text}\n[{low:{form}}, {high:{form}}]"


def _tau(arm: Arm) -> str:
    return interval(arm.drafter.get("tau"), arm.drafter.get("tau_low"), arm.drafter.get("tau_high"), ".3f")


def _speedup(arm: Arm) -> str:
    return interval(arm.speed.get("speedup"), arm.speed.get("speedup_low"), arm.speed.get("speedup_high"), ".3f")


def _shares(arm: Arm) -> str:
    draft, verify = (number(arm.speed.get(f"{name}_share"), ".0%") for name in ("draft", "verify"))
    return ABSENT if ABSENT in (draft, verify) else f"{draft}/{verify}"


def _first_token(arm: Arm) -> str:
    first, late = (number(arm.speed.get(f"first_token_s_{name}"), ".3f") for name in ("median", "p95"))
    return ABSENT if first == ABSENT else f"{first} ({late})"


def _of_speed(heading: str, field: str, form: str) -> Column:
    return Column(heading, lambda arm: number(arm.speed.get(field), form))


DECODING = Column("decoding", lambda arm: name_of(arm.name))
TAU = Column("tau [95 %]", _tau)
TOKENS_PER_S = _of_speed("tokens/s", "tokens_per_s", ".1f")
SPEEDUP = Column("speed-up [95 %]", _speedup)
BLOCK = Column("block", lambda arm: number(arm.speed.get("block_size", arm.drafter.get("block_size")), "d"))
VERIFIED = Column("verified a step", lambda arm: number(arm.drafter.get("verified_per_step"), ".2f"))
TAU_SERVED = _of_speed("tau served", "tau_served", ".2f")
SHARES = Column("draft/verify", _shares)
DRAFT_MS = _of_speed("draft ms a step", "draft_ms_per_step", ".1f")
VERIFY_MS = _of_speed("verify ms a step", "verify_ms_per_step", ".1f")
OF_A_REQUEST = _of_speed("tokens/s of a request", "request_tokens_per_s_median", ".1f")
FIRST_TOKEN = Column("first token s (95th percentile)", _first_token)
IDENTICAL = _of_speed("identical outputs", "identical_share", ".1%")


def minus(other: str) -> Column:
    """A drafter's tau minus that of another one."""

    def cell(arm: Arm) -> str:
        difference = (arm.drafter.get("differences") or {}).get(other, {})
        return interval(difference.get("value"), difference.get("low"), difference.get("high"), "+.3f")

    return Column(f"tau minus {name_of(other)}'s [95 %]", cell)


def arms_of(evaluation: Mapping[str, Any]) -> list[Arm]:
    """In the order in which they were measured: plain decoding first."""
    drafters, speed = evaluation.get("drafters") or {}, evaluation.get("speed") or {}
    names = dict.fromkeys((*speed, *drafters))
    return [Arm(name, drafters.get(name, {}), speed.get(name, {})) for name in names]


def arms_table(evaluation: Mapping[str, Any], columns: Sequence[Column], title: str = "", caption: str = "") -> Table:
    """A row for every arm."""
    rows = [[column.cell(arm) for column in columns] for arm in arms_of(evaluation)]
    return Table([column.heading for column in columns], rows, title, caption)


def headline(evaluation: Mapping[str, Any]) -> Table | None:
    """The drafters beside plain decoding at the first setting; None where nothing was measured."""
    arms = arms_of(evaluation)
    if not arms:
        return None
    others = dict.fromkeys(other for arm in arms for other in arm.drafter.get("differences") or {})
    cut = [VERIFIED] if any("verified_per_step" in arm.drafter for arm in arms) else []
    columns = [DECODING, TAU, *map(minus, others), TOKENS_PER_S, SPEEDUP, BLOCK, *cut, TAU_SERVED, SHARES, IDENTICAL]
    return arms_table(evaluation, columns, title="Held-out prompts", caption=intervals(evaluation))


def intervals(evaluation: Mapping[str, Any]) -> str:
    """What the figures of a table are, and of what their intervals."""
    sentences = []
    if definition := evaluation.get("definition_of_tau"):
        sentences.append(f"tau: {definition}.")
    over = [f"of tau over {n} prompts" for n in _all(evaluation, "drafters", "prompts")]
    over += [
        f"of speed-ups over {turns} turn{'s' * (turns != 1)} of the same {prompts} prompts"
        for turns in _all(evaluation, "speed", "turns")
        for prompts in _all(evaluation, "speed", "prompts")
    ]
    sentences.append(f"In brackets: single 95 % intervals{''.join(f', {each}' for each in over)}.")
    if evaluation.get("block_size_candidates"):
        sentences.append(
            "Each drafter decodes with its own fastest block, of candidates that decoded "
            f"{evaluation['validation_prompts']} validation prompts once."
        )
    return " ".join(sentences)


def _all(evaluation: Mapping[str, Any], part: str, name: str) -> list[Any]:
    """What all arms have in common, none or one."""
    found = {arm[name] for arm in (evaluation.get(part) or {}).values() if arm.get(name) is not None}
    return list(found) if len(found) == 1 else []


def by_setting(evaluation: Mapping[str, Any]) -> Table | None:
    """Speed at every temperature and concurrency; None where the headline holds all that was measured."""
    settings = evaluation.get("speed_by_setting") or []
    if len(settings) < 2 and not any("first_token_s_median" in arm for s in settings for arm in s["arms"].values()):
        return None
    columns = [DECODING, TOKENS_PER_S, SPEEDUP, TAU_SERVED, OF_A_REQUEST, FIRST_TOKEN, IDENTICAL]
    rows = [
        [f"{setting['temperature']:g}", str(setting["concurrency"]), *(c.cell(Arm(name, {}, speed)) for c in columns)]
        for setting in settings
        for name, speed in setting["arms"].items()
    ]
    return Table(
        ["temperature", "in flight", *(column.heading for column in columns)],
        rows,
        title="Speed by setting",
        caption=f"Engine: {evaluation.get('engine', ABSENT)}. In brackets: single 95 % intervals over turns and "
        "prompts. Tokens/s of a request and its first token: medians over requests.",
        text_columns=3,
    )


def exactness(evaluation: Mapping[str, Any]) -> list[str]:
    """Sentences on the outputs being the target's own, and on what was served being what replay computes."""
    found = evaluation.get("exactness") or {}
    sentences = []
    if found.get("fp32_prompts"):
        sentences.append(
            f"In fp32, {found.get('fp32_identical')} of {found['fp32_prompts']} outputs of speculative decoding equal "
            "plain decoding, token for token."
        )
    share, margin = (
        number(found.get(name), form) for name, form in (("identical_share", ".1%"), ("median_margin", ".3g"))
    )
    if share != ABSENT:
        where = found.get("serving_dtype") or "the serving dtype"
        sentences.append(f"In {where}, {share} of the outputs of speculative decoding equal plain decoding.")
    if margin != ABSENT:
        sentences.append(f"Where they part, the worse token lies {margin} logits below the target's best (median).")
    for arm, figures in (evaluation.get("parity") or {}).items():
        if "served_steps" in figures:
            sentences.append(
                f"{name_of(arm)}: {figures['different_steps']} of {figures['served_steps']} verify steps that the "
                "engine served differ from replay."
            )
        else:
            sentences.append(
                f"{name_of(arm)}: tau is {figures['served_tau']:.3f} as served and {figures['replayed_tau']:.3f} in "
                "replay of the same answers."
            )
    return sentences


def repetitions(evaluation: Mapping[str, Any]) -> list[str]:
    """Sentences on answers that repeat themselves: their tau may say little about other text."""
    share = number(evaluation.get("loop_share"), ".1%")
    if share == ABSENT:
        return []
    sentences = [f"{share} of the held-out answers repeat some six tokens three times or more."]
    taus = {name_of(arm): number(tau, ".2f") for arm, tau in (evaluation.get("tau_without_loops") or {}).items()}
    figures = [f"{arm} {tau}" for arm, tau in taus.items() if tau != ABSENT]
    if figures:
        sentences.append(f"tau without them: {', '.join(figures)}.")
    return sentences


def gate(decision: Mapping[str, Any]) -> Table | None:
    """Of `decision.json`: every rule, what became of it, and its figures with the threshold."""
    if not decision.get("rules"):
        return None
    rules = [[rule["name"], _became(rule), rule["said"]] for rule in decision["rules"]]
    return Table(("rule", "outcome", "figures"), rules, title="Gate", text_columns=3)


def chosen(evaluation: Mapping[str, Any]) -> list[str]:
    """A sentence on which arm the gate was asked about, and why that one; none where nothing was chosen."""
    taus = {arm: tau for arm, tau in (evaluation.get("validation_tau") or {}).items() if arm != CHAMPION}
    if len(taus) < 2 or not evaluation.get("drafters"):
        return []
    told = ", ".join(f"{name_of(arm)} {number(tau, '.3f')}" for arm, tau in taus.items())
    challenger = name_of(challenger_of(evaluation))
    return [f"The challenger is {challenger}, chosen by tau on the validation split alone: {told}."]


def _became(rule: Mapping[str, Any]) -> str:
    if not rule["judged"]:
        return "not judged"
    return "passed" if rule["passed"] else "BROKEN"


def doubts(evaluation: Mapping[str, Any]) -> list[str]:
    """Sentences on figures of speed that cannot be, or that say nothing."""
    several = len(evaluation.get("speed_by_setting") or ()) > 1
    found = []
    for doubt in evaluation.get("doubts") or ():
        where = f" (at temperature {doubt['temperature']:g}, {doubt['concurrency']} in flight)" if several else ""
        found.append(f"{doubt['said'][0].upper()}{doubt['said'][1:]}{where}.")
    return list(dict.fromkeys(found))
