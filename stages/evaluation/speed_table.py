"""The speed table: tokens/s and speed-ups over turns, latencies, and what drafting gave.

Two arms that decode the same prompts in the same round are compared by the logarithm of the ratio of their tokens/s.
Where the arms alternate prompt by prompt, the prompts are the repetitions: the ratio is that of sums over prompts, its
error the jackknife's. Noise of a busy machine is in that error, and what it does to all arms of a prompt cancels.

Turns of whole arms (servers; several requests in flight) have two errors. Rounds are the repetitions: what a machine
does to a whole round (heat, neighbours) cancels. The prompts are the same in every turn and a sample of those that are
served, some of which a drafter guesses better: that error is the jackknife's over prompts, and where several are in
flight a bootstrap's of what their turns take. Sampled answers differ from round to round.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from draftsmith.stages.evaluation.timed_runs import PLAIN, Setting
from draftsmith.stages.evaluation.verdicts import Pair, pairs
from draftsmith.stages.runtime.statistics import Estimate, combine_errors, jackknife, mean_estimate, sum_by_key

Units = Mapping[str, str]  # what each prompt is an observation of; a prompt that has none is one itself


def speed_by_setting(
    turns: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    settings: Sequence[Setting],
    units: Units,
) -> list[dict[str, Any]]:
    """`speed_table` of every setting, in their order."""
    found = []
    for setting in settings:
        arms = speed_table(at_setting(turns, setting), at_setting(rows, setting), units)
        found.append({"temperature": setting.temperature, "concurrency": setting.concurrency, "arms": arms})
    return found


def at_setting(rows: Sequence[Mapping[str, Any]], setting: Setting) -> list[Mapping[str, Any]]:
    """The rows of one setting, of the table `turns` or `requests`."""
    return [r for r in rows if (r["temperature"], r["concurrency"]) == (setting.temperature, setting.concurrency)]


def speed_table(
    turns: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], units: Units
) -> dict[str, dict[str, Any]]:
    """Figures of each arm at one setting; figures that no row has (latencies, accepted lengths) are left out.

    turns, rows: of the tables `turns` and `requests`. `speedup` is over plain decoding, `ratios` over other drafters;
    both have 95 % intervals (`log_ratios`).
    """
    table: dict[str, dict[str, Any]] = {}
    drafters = [arm for arm in dict.fromkeys(turn["arm"] for turn in turns) if arm != PLAIN]
    ratios = log_ratios(turns, rows, pairs(drafters), units)
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
        (over_plain,) = log_ratios(turns, rows, [(arm, PLAIN)], units).values()
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


def alternates(turns: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether the arms of these turns decoded one prompt after the other, each by all arms."""
    return bool(turns) and all(turn["concurrency"] == 1 and turn.get("batches", 1) > 1 for turn in turns)


def speed_by_set(
    rows: Sequence[Mapping[str, Any]], sets: Mapping[str, str], units: Units, *, alternating: bool
) -> dict[str, dict[str, dict[str, float | None]]]:
    """Set -> drafter -> `speedup` over plain decoding as the set's requests saw it, with its 95 % interval.

    rows: of the table `requests` at one setting. sets: the prompt set of each prompt. A request's speed is its tokens
    by its latency, which several at a time share with others. alternating: as `alternates` of its turns.
    """
    found: dict[str, dict[str, dict[str, float | None]]] = {}
    for name in dict.fromkeys(sets.values()):
        sums: dict[tuple[str, int], list[float]] = {}  # tokens, seconds
        own = [row for row in rows if sets.get(row["prompt_id"]) == name]
        for row in own:
            turn = sums.setdefault((row["arm"], row["round"]), [0.0, 0.0])
            turn[0] += row["tokens"]
            turn[1] += row["latency_seconds"]
        if any(seconds <= 0 for _, seconds in sums.values()):  # the engine does not say
            continue
        like = {"concurrency": 1, "batches": 2 if alternating else 1}
        turns = [{"arm": arm, "round": n, "tokens": t, "wall_seconds": s, **like} for (arm, n), (t, s) in sums.items()]
        arms = [arm for arm in dict.fromkeys(arm for arm, _ in sums) if arm != PLAIN]
        for (arm, _), ratio in log_ratios(turns, own, [(arm, PLAIN) for arm in arms], units).items():
            factor = _factor(ratio)
            speedup = {"speedup": factor["value"], "speedup_low": factor["low"], "speedup_high": factor["high"]}
            found.setdefault(name, {})[arm] = speedup
    return found


def log_ratios(
    turns: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    wanted: Sequence[Pair],
    units: Units,
) -> dict[Pair, Estimate]:
    """Return the logarithm of how many times as fast the first arm of each pair is as the other one.

    Where arms alternate its units are prompts. Else they are rounds, and its error is of rounds and prompts; of the
    rounds alone where no row has the time of its request. Nothing is known of the error with a single unit, or where
    one prompt outweighs all others.
    """
    found = {}
    in_flight = turns[0].get("concurrency", 1) if turns else 1
    by_prompt = alternates(turns)
    speeds: dict[str, dict[int, float]] = {}
    for turn in turns:
        speeds.setdefault(turn["arm"], {})[turn["round"]] = turn["tokens"] / turn["wall_seconds"]
    for arm, other in wanted:
        over_prompts = _over_prompts(rows, (arm, other), units, in_flight)
        if by_prompt and over_prompts is not None:
            found[arm, other] = over_prompts
            continue
        ratio = mean_estimate(np.array([math.log(speeds[arm][n] / speeds[other][n]) for n in sorted(speeds[other])]))
        found[arm, other] = ratio if over_prompts is None else combine_errors(ratio, over_prompts)
    return found


def _over_prompts(rows: Sequence[Mapping[str, Any]], pair: Pair, units: Units, in_flight: int) -> Estimate | None:
    """The same logarithm as the requests of all rounds saw it, with its error over prompts; that of the turns' wall
    time where several are in flight."""
    timed = [row for row in rows if row["arm"] in pair and row["latency_seconds"] > 0]
    if {row["arm"] for row in timed} != set(pair):
        return None
    keys = [units.get(row["prompt_id"], row["prompt_id"]) for row in timed]
    sums = [
        sum_by_key(keys, np.array([row[name] * (row["arm"] == arm) for row in timed], dtype=np.float64))
        for arm in pair
        for name in ("tokens", "latency_seconds")
    ]
    found = jackknife(_log_ratio_of_speeds, *sums)
    if found.degrees < 1:  # fewer than two units in effect
        return replace(found, error=math.nan)
    return found if in_flight == 1 else replace(found, error=error_over_prompts(timed, pair, keys, in_flight))


def _log_ratio_of_speeds(
    tokens: np.ndarray, seconds: np.ndarray, other_tokens: np.ndarray, other_seconds: np.ndarray
) -> np.ndarray:
    return np.log(tokens / seconds) - np.log(other_tokens / other_seconds)


def _factor(estimate: Estimate) -> dict[str, float | None]:
    """With its 95 % interval; where nothing is known of the error there is none."""
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


_DRAWS = 200
_FIGURES = "tokens", "latency_seconds"


def error_over_prompts(
    rows: Sequence[Mapping[str, Any]], pair: tuple[str, str], keys: Sequence[Hashable], in_flight: int
) -> float:
    """Standard error of the logarithm of how many times as fast the first arm is as the other one, by bootstrap.

    rows: of the table `requests`, of these two arms, in the order in which they were sent. keys: the unit of each row.
    """
    prompts = {row["prompt_id"]: place for place, row in reversed(list(enumerate(rows)))}
    order = {prompt: place for place, prompt in enumerate(sorted(prompts, key=prompts.__getitem__))}
    rounds = {n: place for place, n in enumerate(dict.fromkeys(row["round"] for row in rows))}
    figures = np.zeros((2, 2, len(rounds), len(order) + 1))  # one prompt more, of which nothing is asked
    units: dict[Hashable, dict[int, None]] = {}
    for row, key in zip(rows, keys, strict=True):
        prompt = order[row["prompt_id"]]
        units.setdefault(key, {})[prompt] = None
        figures[pair.index(row["arm"]), :, rounds[row["round"]], prompt] = [row[name] for name in _FIGURES]
    members = np.full((len(units), max(map(len, units.values()))), len(order))
    for place, unit in enumerate(units.values()):
        members[place, : len(unit)] = list(unit)
    drawn = np.random.default_rng(0).integers(len(units), size=(_DRAWS, len(units)))
    places = members[drawn].reshape(_DRAWS, -1)
    speeds = [tokens[:, places].sum(-1) / _wall(seconds[:, places], in_flight) for tokens, seconds in figures]
    ratios = np.log(speeds[0] / speeds[1]).mean(0)
    return float(ratios.std(ddof=1)) * (len(units) / max(1, len(units) - 1)) ** 0.5


def _wall(seconds: np.ndarray, in_flight: int) -> np.ndarray:
    """Until the last request ends, each sent as soon as another one has ended; of the last axis."""
    turns = seconds.reshape(-1, seconds.shape[-1])
    ends, every = np.zeros((len(turns), in_flight)), np.arange(len(turns))
    for each in turns.T:
        ends[every, ends.argmin(-1)] += each
    return ends.max(-1).reshape(seconds.shape[:-1])
