"""Tables of the report's page: acceptance, speed, prompt sets, cost, data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from draftsmith.stages.measure.gate import CHAMPION, challenger_of, gain_of
from draftsmith.stages.reporting import rows
from draftsmith.stages.reporting.names import ABSENT, name_of
from draftsmith.stages.reporting.outcome import duration
from draftsmith.stages.reporting.rows import Table, interval, number

_COUNTED = ("response_tokens", "positions", "tflop")  # what stages say that they made
_GIVEN = ("logs",)  # stages whose answers were there before


def acceptance(evaluation: Mapping[str, Any]) -> Table | None:
    """tau of every drafter, and its differences."""
    drafters = evaluation.get("drafters") or {}
    if not drafters:
        return None
    others = dict.fromkeys(other for each in drafters.values() for other in each.get("differences") or {})
    columns = [rows.DECODING, rows.TAU, *map(rows.minus, others), rows.BLOCK]
    shown = rows.arms_table({"drafters": drafters}, columns, "Acceptance")
    return Table(shown.head, shown.rows, shown.title, rows.intervals({**evaluation, "speed": {}}))


def speed(evaluation: Mapping[str, Any]) -> Table | None:
    """At the first setting."""
    if not evaluation.get("speed"):
        return None
    columns = [rows.DECODING, rows.TOKENS_PER_S, rows.SPEEDUP, rows.BLOCK, rows.TAU_SERVED, rows.SHARES, rows.IDENTICAL]
    only = {name: evaluation[name] for name in evaluation if name not in ("drafters", "definition_of_tau")}
    return rows.arms_table(only, columns, "Speed", rows.intervals(only))


def by_set(evaluation: Mapping[str, Any]) -> Table | None:
    """tau of each drafter within every prompt set, and the challenger's beside the champion's there."""
    sets = evaluation.get("sets") or {}
    if not sets:
        return None
    arms = [arm for arm in evaluation["drafters"] if any(arm in each for each in sets.values())]
    challenger = challenger_of(evaluation)
    with_champion = CHAMPION in arms
    with_speed = any("speedup" in (each.get(challenger) or {}) for each in sets.values())
    shown = []
    for name, each in sets.items():
        prompts = max((each[arm].get("prompts", 0) for arm in arms if arm in each), default=0)
        taus = [_tau(each.get(arm) or {}) for arm in arms]
        beside = [_beside_champion(evaluation, challenger, name)] * with_champion
        shown.append([name, str(prompts), *taus, *beside, *([_speedup(each.get(challenger) or {})] * with_speed)])
    head = ["prompt set", "prompts", *(f"tau of {name_of(arm)}" for arm in arms)]
    head += [f"{name_of(challenger)} beside the champion"] * with_champion
    head += [f"speed-up of {name_of(challenger)}"] * with_speed
    note = "In brackets: single 95 % intervals over the prompts of a set"
    note += "; speed-ups are those of its requests at the first setting, over turns and prompts." if with_speed else "."
    return Table(head, shown, "By prompt set", note)


def _tau(figures: Mapping[str, Any]) -> str:
    return interval(figures.get("tau"), figures.get("low"), figures.get("high"), ".3f")


def _speedup(figures: Mapping[str, Any]) -> str:
    return interval(figures.get("speedup"), figures.get("speedup_low"), figures.get("speedup_high"), ".3f")


def _beside_champion(evaluation: Mapping[str, Any], arm: str, name: str | None) -> str:
    wanted = {"kind": "tau", "arm": arm, "other": CHAMPION, "set": name}
    for found in evaluation.get("compared") or ():
        if all(found.get(key) == value for key, value in wanted.items()) and found["base"]:
            gain = gain_of(found)
            low, high = gain.interval() or (None, None)
            return interval(gain.value, low, high, "+.1%")
    return ABSENT


def cost(artifacts: Sequence[Mapping[str, Any]]) -> Table | None:
    """Wall time and tokens of every artifact behind the report, and of all together."""
    if not artifacts:
        return None
    total = sum(each.get("duration_s") or 0.0 for each in artifacts)
    shown = []
    for each in artifacts:
        seconds = each.get("duration_s") or 0.0
        share = f"{seconds / total:.0%}" if total else ABSENT
        times = [duration(seconds), share, duration(device_seconds([each]))]
        shown.append([str(each.get("name", ABSENT)), *times, *_counts([each])])
    times = [duration(total), "100%" if total else ABSENT, duration(device_seconds(artifacts))]
    shown.append(["all together", *times, *_counts(artifacts)])
    return Table(
        ["stage", "wall time", "share", "device time", "tokens generated", "positions trained", "TFLOP of training"],
        shown,
        "Cost",
        "Wall time of the attempt that finished. Device time: the same for each device that its config asks for, one a "
        "training process or as many as its servers take; shards are counted as one.",
    )


def device_seconds(artifacts: Sequence[Mapping[str, Any]]) -> float:
    """Wall time by the devices that a stage's config asks for."""
    return sum((each.get("duration_s") or 0.0) * _devices(each.get("config") or {}) for each in artifacts)


def _devices(config: Mapping[str, Any]) -> int:
    parallel = config.get("parallel") or {}
    launch = (config.get("engine") or {}).get("launch") or {}
    servers = 1 if "rounds" in config else launch.get("servers", 1)  # an evaluation runs one at a time
    return int(
        parallel.get("processes", 1) * parallel.get("nodes", 1)
        if parallel
        else servers * launch.get("tensor_parallel", 1) * launch.get("data_parallel", 1)
    )


def _counts(artifacts: Sequence[Mapping[str, Any]]) -> list[str]:
    found = []
    for figure in _COUNTED:
        values = [value for each in artifacts if (value := counted(each, figure)) is not None]
        total = sum(values)
        found.append(ABSENT if not values else f"{total:,.0f}" if total >= 100 else f"{total:.3g}")
    return found


def counted(artifact: Mapping[str, Any], figure: str) -> float | None:
    """What its stage has generated or trained: `response_tokens`, `positions` or `tflop`. None where it says nothing,
    and for tokens that production had generated."""
    if figure == "response_tokens" and artifact.get("stage") in _GIVEN:
        return None
    return (artifact.get("metrics") or {}).get(figure)


def prompts_table(prompts: Mapping[str, Any]) -> Table | None:
    """prompts: of `prompts.json`."""
    counts = prompts.get("counts") or {}
    if not counts:
        return None
    splits = list(dict.fromkeys(split for each in counts.values() for split in each))
    shown = [[source, *(str(each.get(split, 0)) for split in splits)] for source, each in counts.items()]
    if len(shown) > 1:
        shown.append(["all", *(str(sum(each.get(split, 0) for each in counts.values())) for split in splits)])
    return Table(["prompt set", *splits], shown, "Prompts")


def set_aside(prompts: Mapping[str, Any], logs: Mapping[str, Any]) -> Table | None:
    """Rows that were not used, by reason."""
    shown = [["prompts", "duplicates", str(prompts["duplicates_removed"])]] if prompts.get("duplicates_removed") else []
    if prompts.get("too_long_skipped"):
        shown.append(["prompts", "too long", str(prompts["too_long_skipped"])])
    for name, told in (("prompts", prompts), ("logs", logs)):
        shown += [[name, reason, str(count)] for reason, count in (told.get("set_aside") or {}).items()]
    not_meant = {
        "outside_window": "outside the window",
        "filtered": "not let through by logs.filter",
        "not_drawn": "not drawn",
    }
    for field, reason in not_meant.items():
        if logs.get(field):
            shown.append(["logs", reason, str(logs[field])])
    for reason, count in (logs.get("improbable") or {}).items():
        shown.append(["logs, used all the same", reason, f"{count} of {logs.get('scored')} that were read"])
    return Table(["of", "reason", "rows"], shown, "Set aside", text_columns=2) if shown else None


def logs_said(logs: Mapping[str, Any]) -> list[str]:
    """Sentences on the logged answers."""
    if not logs:
        return []
    rows_in_files = number(logs.get("rows_in_files"), ",d")
    window = logs.get("window") or {}
    sentences = [
        f"{number(logs.get('used'), ',d')} logged answers are used, of {number(logs.get('rows_read'), ',d')} rows that "
        f"were read ({rows_in_files} in the files), {number(logs.get('response_tokens'), ',d')} tokens in all."
    ]
    if logs.get("replayed"):
        sentences.append(f"{logs['replayed']} answers of the earlier refresh are mixed in.")
    if logs.get("replay_left_out"):
        sentences.append(
            f"None of the earlier refresh are mixed in: {logs['replay_left_out']} changed since they were given."
        )
    if window.get("newest"):
        sentences.append(f"The newest row is of {window['newest']}.")
    return sentences
