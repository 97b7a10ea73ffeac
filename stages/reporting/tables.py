"""Tables of the report. Every cell is finished text; figures that are not there are `ABSENT`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.stages.measure.gate import CHAMPION, challenger_of, gain_of
from draftsmith.stages.reporting.figures import counted, device_seconds
from draftsmith.stages.reporting.names import ABSENT, duration, interval, name_of, number
from draftsmith.stages.reporting.review import Review, Variant, points_of

_COUNTED = ("response_tokens", "positions", "tflop")  # figures that stages report
_NOT_USED = {"outside_window": "outside the window", "filtered": "excluded by logs.filter", "not_drawn": "not sampled"}


@dataclass(frozen=True)
class Table:
    """A table as it is read."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""
    text_columns: int = 1  # the first ones hold words, the others figures


def acceptance(review: Review, evaluation: Mapping[str, Any]) -> Table:
    """The acceptance length of every drafter, and its differences with their adjusted significance."""
    shown = [each for each in review.variants if each.arm in evaluation["drafters"]]
    others = _others(shown, lambda each: each.differences)
    own = {each.arm: evaluation["drafters"][each.arm] for each in shown}
    cut = any("verified_per_step" in each for each in own.values())
    rows = [
        [
            _name(each),
            each.acceptance.text(".3f") if each.acceptance else ABSENT,
            *(each.differences[other].text("+.3f") if other in each.differences else ABSENT for other in others),
            number(own[each.arm].get("block_size"), "d"),
            *([number(own[each.arm].get("verified_per_step"), ".2f")] * cut),
        ]
        for each in shown
    ]
    head = ["drafter", "acceptance length", *(f"vs {name_of(other)}" for other in others), "block"]
    head += ["verified per step"] * cut
    return Table(head, rows, "Acceptance", _adjusted(review))


def _others(variants: Iterable[Variant], differences: Callable[[Variant], Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(other for each in variants for other in differences(each)))


def _name(variant: Variant) -> str:
    return f"{variant.name}\n(candidate)" if variant.candidate else variant.name


def _adjusted(review: Review) -> str:
    several = f", adjusted for {review.comparisons} comparisons" if review.comparisons > 1 else ""
    return f"In brackets: 95 % intervals{several}. n.s.: not significant; ?: inconclusive."


def speed(review: Review, evaluation: Mapping[str, Any]) -> Table | None:
    """Speed at the first setting."""
    measured = evaluation.get("speed") or {}
    if not measured:
        return None
    shown = [each for each in review.variants if each.arm in measured]
    others = _others(shown, lambda each: each.speed_over)
    rows = []
    for each in shown:
        own = measured[each.arm]
        parts = [number(own.get(f"{name}_share"), ".0%") for name in ("draft", "verify")]
        rows.append(
            [
                _name(each),
                number(each.tokens_per_s, ",.1f"),
                f"{each.speedup.text('.3f')}{' *' * each.unreliable}" if each.speedup else ABSENT,
                *(each.speed_over[other].text(".3f") if other in each.speed_over else ABSENT for other in others),
                number(own.get("block_size"), "d"),
                number(own.get("tau_served"), ".2f"),
                ABSENT if ABSENT in parts else " / ".join(parts),
                number(own.get("identical_share"), ".1%"),
            ]
        )
    head = ["decoding with", "tokens/s", "speed-up", *(f"× {name_of(other)}" for other in others)]  # noqa: RUF001
    head += ["block", "acceptance length, served", "draft / verify time", "identical outputs"]
    note = _adjusted(review) + " *: unreliable." * any(each.unreliable for each in shown)
    return Table(head, rows, "Speed", note)


def by_setting(evaluation: Mapping[str, Any]) -> Table | None:
    """Speed at every temperature and concurrency; None where the first holds all that was measured."""
    points = points_of(evaluation)
    if len(points) < 2 and not any("first_token_s_median" in arm for each in points for arm in each["arms"].values()):
        return None
    columns = {
        "tokens/s": ("tokens_per_s", ",.1f"),
        "speed-up": ("speedup", ".3f"),
        "acceptance length, served": ("tau_served", ".2f"),
        "tokens/s of a request": ("request_tokens_per_s_median", ".1f"),
        "first token s": ("first_token_s_median", ".3f"),
        "95th percentile": ("first_token_s_p95", ".3f"),
        "identical outputs": ("identical_share", ".1%"),
    }
    rows = [
        [
            f"{point['temperature']:g}",
            str(point["concurrency"]),
            name_of(arm),
            *(number(own.get(field), form) for field, form in columns.values()),
        ]
        for point in points
        for arm, own in point["arms"].items()
    ]
    return Table(["temperature", "in flight", "decoding with", *columns], rows, "Speed by setting", text_columns=3)


def by_set(evaluation: Mapping[str, Any]) -> Table | None:
    """The acceptance length of each drafter on every prompt set, and the candidate's beside the champion's."""
    sets = {name: each for name, each in (evaluation.get("sets") or {}).items() if each}
    if not sets:
        return None
    arms = [arm for arm in evaluation["drafters"] if any(arm in each for each in sets.values())]
    candidate = challenger_of(evaluation)
    gains = {name: _gain(evaluation, candidate, name) for name in sets} if CHAMPION in arms else {}
    speeds = {name: each.get(candidate) or {} for name, each in sets.items()}
    timed = any("speedup" in each for each in speeds.values())
    rows = []
    for name, each in sets.items():
        prompts = max((each[arm].get("prompts", 0) for arm in arms if arm in each), default=0)
        own = [each.get(arm) or {} for arm in arms]
        lengths = [interval([one.get(end) for end in ("tau", "low", "high")], ".3f") for one in own]
        ends = [speeds[name].get(f"speedup{end}") for end in ("", "_low", "_high")]
        rows.append(
            [name, str(prompts), *lengths, *([gains[name]] if gains else []), *([interval(ends, ".3f")] * timed)]
        )
    head = ["prompt set", "prompts", *map(name_of, arms), *(["candidate vs champion"] if gains else [])]
    head += ["speed-up of the candidate"] * timed
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


def cost(artifacts: Sequence[Mapping[str, Any]]) -> Table | None:
    """Wall time and tokens of every artifact that the report rests on, and of all together."""
    if not artifacts:
        return None
    total = sum(each.get("duration_s") or 0.0 for each in artifacts)
    groups = [*((str(each.get("name", ABSENT)), [each]) for each in artifacts), ("total", artifacts)]
    rows = []
    for name, group in groups:
        seconds = sum(each.get("duration_s") or 0.0 for each in group)
        share = f"{seconds / total:.0%}" if total else ABSENT
        rows.append([name, duration(seconds), share, duration(device_seconds(group)), *_counts(group)])
    head = ["stage", "wall time", "share", "device time", "tokens generated", "positions trained", "TFLOP of training"]
    note = (
        "Wall time of the attempt that finished, reused stages included. Device time: times the devices of its config."
    )
    return Table(head, rows, "Cost", note)


def _counts(artifacts: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for figure in _COUNTED:
        values = [value for each in artifacts if (value := counted(each, figure)) is not None]
        total = sum(values)
        found.append(ABSENT if not values else f"{total:,.0f}" if total >= 100 else f"{total:.3g}")
    return found


def prompts_table(prompts: Mapping[str, Any]) -> Table | None:
    """Prompts by set and split, of `prompts.json`."""
    counts = prompts.get("counts") or {}
    splits = list(dict.fromkeys(split for each in counts.values() for split in each))
    rows = [[source, *(str(each.get(split, 0)) for split in splits)] for source, each in counts.items()]
    return Table(["prompt set", *splits], rows, "Prompts") if rows else None


def not_used(prompts: Mapping[str, Any], logs: Mapping[str, Any]) -> Table | None:
    """Rows that were not used, by reason."""
    rows = []
    for field, reason in (("duplicates_removed", "duplicates"), ("too_long_skipped", "too long")):
        rows += [["prompts", reason, str(prompts[field])]] if prompts.get(field) else []
    for name, found in (("prompts", prompts), ("logs", logs)):
        rows += [[name, reason, str(count)] for reason, count in (found.get("set_aside") or {}).items()]
    rows += [["logs", reason, str(logs[field])] for field, reason in _NOT_USED.items() if logs.get(field)]
    for reason, count in (logs.get("improbable") or {}).items():
        rows.append(["logs, used anyway", reason, f"{count} of {logs.get('scored')} that were checked"])
    return Table(["of", "reason", "rows"], rows, "Rows not used", text_columns=2) if rows else None


def logs_used(logs: Mapping[str, Any]) -> str:
    """Return how many logged answers were used; empty without logs."""
    if not logs:
        return ""
    used, read, files, tokens = (
        number(logs.get(name), ",d") for name in ("used", "rows_read", "rows_in_files", "response_tokens")
    )
    said = f"{used} logged answers ({tokens} tokens) were used, of {read} rows read ({files} in the files)."
    if logs.get("replayed"):
        said += f" {logs['replayed']} answers of the earlier refresh were mixed in."
    if logs.get("replay_left_out"):
        said += f" None of the earlier refresh were mixed in: {logs['replay_left_out']} changed since."
    return said


def most_rejected(mining: Mapping[str, Any]) -> Table | None:
    """Proposals that the target rejected most often in mining."""
    tokens: Sequence[Mapping[str, Any]] = mining.get("most_rejected") or []
    if not tokens:
        return None
    certain, note = mining.get("certain_errors") or {}, ""
    if (share := certain.get("share")) is not None:
        least = certain["at_least"]
        note = f"In {share:.0%} of all rejections the target's best token had a probability of at least {least}."
    rows = [[_token(token.get(column)) for column in tokens[0]] for token in tokens]
    return Table([column.replace("_", " ") for column in tokens[0]], rows, "Most rejected tokens", note)


def _token(value: Any) -> str:
    if value is None:
        return ABSENT
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) and value.isprintable() and value.strip() == value else repr(value)


def lineage(artifacts: Sequence[Mapping[str, Any]]) -> Table | None:
    """Every artifact that the report rests on."""
    rows = []
    for each in artifacts:
        config = each.get("config") or {}
        known = each.get("stage") == CHAMPION and {"line", "version"} <= config.keys()
        name = str(each.get("name", ABSENT)) + (f" ({config['line']}@{config['version']})" if known else "")
        rows.append([name, *(str(each.get(field, ABSENT))[:16] for field in ("stage", "key", "content_id"))])
    head = ["artifact", "stage", "key", "content id"]
    return Table(head, rows, "Lineage", "`draftsmith show KEY` shows an artifact.", text_columns=4) if rows else None
