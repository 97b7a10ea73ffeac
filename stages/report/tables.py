"""Tables of the report. Every cell is finished text; figures that are not there are `ABSENT`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.stages.evaluation.gate_rules import CHAMPION, challenger_of, gain_of
from draftsmith.stages.report.metrics import counted, device_seconds
from draftsmith.stages.report.names import ABSENT, duration, interval, name_of, number
from draftsmith.stages.report.review import Review, points_of

_COUNTED = ("response_tokens", "positions", "tflop")  # figures that stages report


@dataclass(frozen=True)
class Table:
    """A table as it is read."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""
    text_columns: int = 1  # the first ones hold words, the others figures


def drafters(review: Review, evaluation: Mapping[str, Any], *, short: bool = False) -> Table:
    """Acceptance length and speed of every variant, with adjusted significance; short: as it fits on a screen."""
    digits = ".2f" if short else ".3f"
    others = [review.other] if short and review.other else _others(each.differences for each in review.variants)
    timed = [] if short else _others(each.speed_over for each in review.variants)
    further = {"block": ("block_size", "d")}
    rows = []
    for each in review.variants:
        beside = [each.differences.get(other) for other in others]
        factors = [each.speed_over.get(other) for other in timed]
        own = (evaluation["drafters"].get(each.arm) or {}) | ((evaluation.get("speed") or {}).get(each.arm) or {})
        rows.append(
            [
                f"{each.name} ◂" if each.candidate else each.name,
                each.acceptance.text(digits) if each.acceptance else ABSENT,
                *((f"{d.value:+.2f}{d.mark}" if short else d.text("+.3f")) if d else ABSENT for d in beside),
                number(each.tokens_per_s, ",.1f"),
                f"{each.speedup.text(digits)}{' *' * each.unreliable}" if each.speedup else ABSENT,
                *(factor.text(digits) if factor else ABSENT for factor in factors),
                *([] if short else [number(own.get(name), form) for name, form in further.values()]),
            ]
        )
    head = ["", "acceptance length", *(f"vs {name_of(other)}" for other in others), "tokens/s", "speed-up"]
    head += [] if short else [*(f"speed vs {name_of(other)}" for other in timed), *further]
    return Table(head, rows, "Drafters", _legend(rows, review))


def _others(differences: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(other for each in differences for other in each))


def _legend(rows: Sequence[Sequence[str]], review: Review) -> str:
    """What the marks mean that are in a table."""
    shown = "\n".join(cell for row in rows for cell in row)
    marks = {"◂": "◂ candidate", " n.s.": "n.s. not significant", " ?": "? inconclusive", " *": "* unreliable"}
    marks["["] = f"[95 %, for {review.comparisons} comparisons]" if review.comparisons > 1 else "[95 %]"
    return "  ".join(meaning for mark, meaning in marks.items() if mark in shown)


def by_setting(evaluation: Mapping[str, Any]) -> Table | None:
    """Speed at every temperature and concurrency."""
    points = points_of(evaluation)
    columns = {
        "tokens/s": ("tokens_per_s", ",.1f"),
        "speed-up": ("speedup", ".3f"),
        "acceptance length, served": ("tau_served", ".2f"),
        "draft time": ("draft_share", ".0%"),
        "verify time": ("verify_share", ".0%"),
        "tokens/s of a request": ("request_tokens_per_s_median", ".1f"),
        "first token s": ("first_token_s_median", ".3f"),
        "95th percentile": ("first_token_s_p95", ".3f"),
        "identical outputs": ("identical_share", ".1%"),
    }
    rows = [
        [
            number(point.get("temperature"), "g"),
            number(point.get("concurrency"), "d"),
            name_of(arm),
            *(number(own.get(field), form) for field, form in columns.values()),
        ]
        for point in points
        for arm, own in point["arms"].items()
    ]
    return (
        Table(["temperature", "in flight", "decoding with", *columns], rows, "Speed by setting", text_columns=3)
        if rows
        else None
    )


def by_set(evaluation: Mapping[str, Any]) -> Table | None:
    """The acceptance length of each drafter on every prompt set, and the candidate's beside the champion's."""
    sets = {name: each for name, each in (evaluation.get("sets") or {}).items() if each}
    if not sets:
        return None
    arms = [arm for arm in evaluation["drafters"] if any(arm in each for each in sets.values())]
    candidate = challenger_of(evaluation)
    gains = {name: _gain(evaluation, candidate, name) for name in sets} if CHAMPION in arms else {}
    rows = []
    for name, each in sets.items():
        prompts = max((each[arm].get("prompts", 0) for arm in arms if arm in each), default=0)
        own = [each.get(arm) or {} for arm in arms]
        lengths = [interval([one.get(end) for end in ("tau", "low", "high")], ".3f") for one in own]
        rows.append([name, str(prompts), *lengths, *([gains[name]] if gains else [])])
    head = ["prompt set", "prompts", *map(name_of, arms), *(["candidate vs champion"] if gains else [])]
    note = "Acceptance lengths. In brackets: 95 % intervals of each set alone, not adjusted for their number."
    return Table(head, rows, "By prompt set", note)


def _gain(evaluation: Mapping[str, Any], arm: str, name: str) -> str:
    wanted = {"kind": "tau", "arm": arm, "other": CHAMPION, "set": name}
    for found in evaluation.get("compared") or ():
        if all(found.get(key) == value for key, value in wanted.items()) and found["base"]:
            gain = gain_of(found)
            return interval([gain.value, *(gain.interval() or (None, None))], "+.1%")
    return ABSENT


def gate(review: Review) -> Table | None:
    """Every rule, what became of it, and its figures with the threshold."""
    rows = [[each.name, f"{each.tick} {each.result}", each.said] for each in review.checks]
    return Table(("rule", "result", "figures"), rows, "Gate", text_columns=3) if rows else None


def chosen(evaluation: Mapping[str, Any]) -> str:
    """Return why this variant is the candidate; empty where there was no choice."""
    lengths = {arm: tau for arm, tau in (evaluation.get("validation_tau") or {}).items() if arm != CHAMPION}
    if len(lengths) < 2:
        return ""
    said = ", ".join(f"{name_of(arm)} {number(tau, '.3f')}" for arm, tau in lengths.items())
    candidate = name_of(challenger_of(evaluation))
    return f"{candidate} is the candidate: it has the highest acceptance length on the validation split ({said})."


def stages(artifacts: Sequence[Mapping[str, Any]]) -> Table | None:
    """Every artifact that the report rests on, with its time and tokens, and all together."""
    if not artifacts:
        return None
    rows = []
    for name, group in [*((_name(each), [each]) for each in artifacts), ("total", artifacts)]:
        where = f"{group[0].get('stage', ABSENT)}/{str(group[0].get('key', ''))[:16]}" if len(group) == 1 else ""
        seconds = sum(each.get("duration_s") or 0.0 for each in group)
        rows.append([name, where, duration(seconds), duration(device_seconds(group)), *_counts(group)])
    head = [
        "made",
        "artifact",
        "wall time",
        "device time",
        "tokens generated",
        "positions trained",
        "TFLOP of training",
    ]
    note = (
        "Wall time of the attempt that finished, reused stages included; device time: times the devices of its config."
    )
    return Table(head, rows, "Stages", note, text_columns=2)


def _name(artifact: Mapping[str, Any]) -> str:
    config, name = artifact.get("config") or {}, str(artifact.get("name", ABSENT))
    known = artifact.get("stage") == CHAMPION and {"line", "version"} <= config.keys()
    return f"{name} ({config['line']}@{config['version']})" if known else name


def _counts(artifacts: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for figure in _COUNTED:
        values = [value for each in artifacts if (value := counted(each, figure)) is not None]
        total = sum(values)
        found.append(ABSENT if not values else f"{total:,.0f}" if total >= 100 else f"{total:.3g}")
    return found
