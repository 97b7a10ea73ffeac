"""The speed table: tokens/s and speed-ups over turns, latencies, and what drafting gave.

The unit of every interval is a turn: two arms that decode the same prompts in the same round are compared by the
logarithm of the ratio of their tokens/s, and rounds are the repetitions. What a machine does to a whole round (heat,
neighbours) cancels. The prompts are the same in every turn: an interval is of these prompts. Sampled answers are drawn
anew in every round.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from draftsmith.stages.measure.requests import PLAIN, Setting
from draftsmith.stages.measure.verdicts import Pair, pairs
from draftsmith.stages.statistics import Estimate, mean


def speed_by_setting(
    turns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], settings: Sequence[Setting]
) -> list[dict[str, Any]]:
    """`speed_table` of every setting, in their order."""
    found = []
    for setting in settings:
        arms = speed_table(at_setting(turns, setting), at_setting(rows, setting))
        found.append({"temperature": setting.temperature, "concurrency": setting.concurrency, "arms": arms})
    return found


def at_setting(rows: Sequence[Mapping[str, Any]], setting: Setting) -> list[Mapping[str, Any]]:
    """The rows of one setting, of the table `turns` or `requests`."""
    return [r for r in rows if (r["temperature"], r["concurrency"]) == (setting.temperature, setting.concurrency)]


def speed_table(turns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Figures of each arm at one setting; figures that no row has (latencies, accepted lengths) are left out.

    turns, rows: of the tables `turns` and `requests`. `speedup` is over plain decoding, `ratios` over other drafters;
    both are geometric means over turns.
    """
    table: dict[str, dict[str, Any]] = {}
    drafters = [arm for arm in dict.fromkeys(turn["arm"] for turn in turns) if arm != PLAIN]
    ratios = log_ratios(turns, pairs(drafters))
    for arm in (PLAIN, *drafters):
        own = [turn for turn in turns if turn["arm"] == arm]
        requests = [row for row in rows if row["arm"] == arm]
        tokens, wall, draft, verify, steps = (
            float(sum(turn[name] for turn in own))
            for name in ("tokens", "wall_seconds", "draft_seconds", "verify_seconds", "verify_steps")
        )
        prompts = sum(turn["prompts"] for turn in own)
        table[arm] = {
            "tokens_per_s": tokens / wall,
            "turns": len(own),
            "prompts": own[0]["prompts"],
            **_latencies(requests),
        }
        if arm == PLAIN:
            continue
        (over_plain,) = log_ratios(turns, [(arm, PLAIN)]).values()
        speedup = _factor(over_plain)
        table[arm] |= {"speedup": speedup["value"], "speedup_low": speedup["low"], "speedup_high": speedup["high"]}
        table[arm]["ratios"] = {other: _factor(found) for (a, other), found in ratios.items() if a == arm}
        if verify:  # servers do not say
            table[arm]["draft_ms_per_step"] = 1e3 * draft / max(1.0, steps)
            table[arm]["verify_ms_per_step"] = 1e3 * verify / max(1.0, steps)
            table[arm]["draft_share"] = draft / wall
            table[arm]["verify_share"] = verify / wall
        # the prefill's token is committed before any verify step
        table[arm]["tau_served"] = (tokens - prompts) / max(1.0, steps)
        identical = [row["identical"] for row in requests if row["identical"] is not None]
        table[arm]["identical_share"] = sum(identical) / len(identical) if identical else None
        block_size = own[0]["block_size"]
        lengths = [n for row in requests for n in row["accepted"] or ()]
        if lengths:
            table[arm]["accepted_histogram"] = np.bincount(lengths, minlength=block_size).tolist()
        table[arm]["block_size"] = block_size
    return table


def speed_by_set(
    rows: Sequence[Mapping[str, Any]], sets: Mapping[str, str]
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Set -> drafter -> `speedup` over plain decoding as the set's requests saw it, with its 95 % interval over rounds.

    rows: of the table `requests` at one setting. sets: the prompt set of each prompt. A request's speed is its tokens
    by its latency, which several at a time share with others.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in dict.fromkeys(sets.values()):
        sums: dict[tuple[str, int], list[float]] = {}  # tokens, seconds
        for row in rows:
            if sets.get(row["prompt_id"]) == name:
                turn = sums.setdefault((row["arm"], row["round"]), [0.0, 0.0])
                turn[0] += row["tokens"]
                turn[1] += row["latency_seconds"]
        if any(seconds <= 0 for _, seconds in sums.values()):  # the engine does not say
            continue
        turns = [{"arm": arm, "round": n, "tokens": t, "wall_seconds": s} for (arm, n), (t, s) in sums.items()]
        arms = [arm for arm in dict.fromkeys(arm for arm, _ in sums) if arm != PLAIN]
        for (arm, _), ratio in log_ratios(turns, [(arm, PLAIN) for arm in arms]).items():
            factor = _factor(ratio)
            speedup = {"speedup": factor["value"], "speedup_low": factor["low"], "speedup_high": factor["high"]}
            found.setdefault(name, {})[arm] = speedup
    return found


def log_ratios(turns: Sequence[Mapping[str, Any]], wanted: Sequence[Pair]) -> dict[Pair, Estimate]:
    """Logarithm of how many times as fast the first arm of each pair is as the other one: the mean over rounds."""
    speeds: dict[str, dict[int, float]] = {}
    for turn in turns:
        speeds.setdefault(turn["arm"], {})[turn["round"]] = turn["tokens"] / turn["wall_seconds"]
    return {
        (arm, other): mean(np.array([math.log(speeds[arm][n] / speeds[other][n]) for n in sorted(speeds[other])]))
        for arm, other in wanted
    }


def _factor(estimate: Estimate) -> dict[str, float | None]:
    """With its 95 % interval; a single turn has none."""
    low, high = estimate.interval() or (None, None)
    return {
        "value": math.exp(estimate.value),
        "low": None if low is None else math.exp(low),
        "high": None if high is None else math.exp(high),
    }


def _latencies(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Time to the first token and tokens/s as a single request sees them."""
    figures = {}
    first = np.array([row["first_token_seconds"] for row in rows])
    if not np.isnan(first).all():
        figures["first_token_s_median"] = float(np.nanmedian(first))
        figures["first_token_s_p95"] = float(np.nanquantile(first, 0.95))
    rates = [row["tokens"] / row["latency_seconds"] for row in rows if row["latency_seconds"] > 0]
    if rates:
        figures["request_tokens_per_s_median"] = float(np.median(rates))
    return figures
