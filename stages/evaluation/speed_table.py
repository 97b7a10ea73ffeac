"""The speed table: tokens/s, speed-ups and latencies, from rows of the tables `turns` (timed runs) and `requests`.

Two arms that decode the same prompts in the same round are compared by the logarithm of the ratio of their tokens/s.
Where the arms alternate prompt by prompt, the prompts are the repetitions: the ratio is that of sums over prompts, with
the jackknife's error. That error includes the noise of a busy machine; a slowdown of all arms of a prompt cancels.

Timed runs of whole arms (servers; several requests in flight) have two errors. Rounds are the repetitions: a slowdown
of a whole round (heat, other programs) cancels. The prompts are the same in every run and a sample of the served ones,
some of which a drafter predicts better: that error is the jackknife's over prompts, or with several requests in flight
a bootstrap's over the duration of the runs. Sampled answers differ from round to round.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from draftsmith.artifacts.results.base import SetMetrics
from draftsmith.artifacts.results.evaluation import PLAIN, Difference, SpeedMetrics, SpeedTable
from draftsmith.stages.evaluation.timed_runs import Row, Setting
from draftsmith.stages.evaluation.verdicts import Pair, pairs
from draftsmith.stages.runtime.statistics import (
    Estimate,
    combine_errors,
    jackknife,
    mean_estimate,
    strata_of,
    stratum_indices,
    sum_by_key,
)

Units = Mapping[str, Hashable]  # prompt -> unit that it is an observation of; without one, it is its own unit


def speed_tables(
    runs: Sequence[Row], requests: Sequence[Row], settings: Sequence[Setting], units: Units
) -> list[SpeedTable]:
    """Return the speeds of all arms at every setting."""
    return [
        SpeedTable(
            temperature=setting.temperature,
            concurrency=setting.concurrency,
            arms=speed_metrics(at_setting(runs, setting), at_setting(requests, setting), units),
        )
        for setting in settings
    ]


def at_setting(rows: Sequence[Row], setting: Setting) -> list[Row]:
    """Return the rows of one setting, of the table `turns` or `requests`."""
    return [r for r in rows if (r["temperature"], r["concurrency"]) == (setting.temperature, setting.concurrency)]


def speed_metrics(runs: Sequence[Row], requests: Sequence[Row], units: Units) -> dict[str, SpeedMetrics]:
    """Return the metrics of each arm at one setting; metrics that no row has (latencies, accepted lengths) stay unset.

    `speedup` is over decoding without a drafter, `ratios` over other drafters, both with 95 % intervals (`log_ratios`).
    """
    drafters = [arm for arm in dict.fromkeys(run["arm"] for run in runs) if arm != PLAIN]
    ratios = log_ratios(runs, requests, pairs(drafters), units)
    table = {}
    for arm in (PLAIN, *drafters):
        own_runs = [run for run in runs if run["arm"] == arm]
        own_requests = [row for row in requests if row["arm"] == arm]
        tokens, wall = (float(sum(run[name] for run in own_runs)) for name in ("tokens", "wall_seconds"))
        metrics: dict[str, object] = {
            "tokens_per_s": tokens / wall,
            "turns": len(own_runs),
            "prompts": len({row["prompt_id"] for row in own_requests}) or own_runs[0]["prompts"],
            **_latencies(own_requests),
        }
        if arm != PLAIN:
            (over_plain,) = log_ratios(runs, requests, [(arm, PLAIN)], units).values()
            metrics |= _speedup(over_plain).to_json()
            metrics["ratios"] = {other: _factor(ratio) for (a, other), ratio in ratios.items() if a == arm}
            metrics |= _drafting_metrics(own_runs, own_requests)
        table[arm] = SpeedMetrics.model_validate(metrics)
    return table


def _drafting_metrics(runs: Sequence[Row], requests: Sequence[Row]) -> dict[str, object]:
    """Return the metrics of drafting and verification from one drafter's runs and requests."""
    tokens, prompts, wall, draft, verify, steps = (
        float(sum(run[name] for run in runs))
        for name in ("tokens", "prompts", "wall_seconds", "draft_seconds", "verify_seconds", "verify_steps")
    )
    metrics: dict[str, object] = {}
    if verify:  # servers do not report it
        metrics["draft_ms_per_step"] = 1e3 * draft / max(1.0, steps)
        metrics["verify_ms_per_step"] = 1e3 * verify / max(1.0, steps)
        metrics["draft_share"] = draft / wall
        metrics["verify_share"] = verify / wall
    # the prefill's token is committed before any verify step
    metrics["tau_served"] = (tokens - prompts) / max(1.0, steps)
    identical = [row["identical"] for row in requests if row["identical"] is not None]
    metrics["identical_share"] = sum(identical) / len(identical) if identical else None
    block_size = runs[0]["block_size"]
    lengths = [n for row in requests for n in row["accepted"] or ()]
    if lengths:
        metrics["accepted_histogram"] = np.bincount(lengths, minlength=block_size).tolist()
    metrics["block_size"] = block_size
    return metrics


def alternates(runs: Sequence[Row]) -> bool:
    """Return whether all arms of these runs decoded a prompt before the next one came."""
    return bool(runs) and all(run["concurrency"] == 1 and run.get("batches", 1) > 1 for run in runs)


def speed_by_slice(
    requests: Sequence[Row], labels: Mapping[str, Sequence[str]], units: Units, *, alternating: bool
) -> dict[str, dict[str, SetMetrics]]:
    """Return slice -> drafter -> speed-up over decoding without a drafter, as seen by the slice's requests.

    requests: those at one setting. labels: those of each prompt, its set first. A request's speed is its tokens divided
    by its latency, which requests in flight share. alternating: `alternates` of the runs.
    """
    speeds: dict[str, dict[str, SetMetrics]] = {}
    for name in dict.fromkeys(chain.from_iterable(labels.values())):
        sums: dict[tuple[str, int], list[float]] = {}  # tokens, seconds
        rows = [row for row in requests if name in labels.get(row["prompt_id"], ())]
        for row in rows:
            run = sums.setdefault((row["arm"], row["round"]), [0.0, 0.0])
            run[0] += row["tokens"]
            run[1] += row["latency_seconds"]
        if any(seconds <= 0 for _, seconds in sums.values()):  # the engine does not report it
            continue
        like = {"concurrency": 1, "batches": 2 if alternating else 1}
        runs = [{"arm": arm, "round": n, "tokens": t, "wall_seconds": s, **like} for (arm, n), (t, s) in sums.items()]
        arms = [arm for arm in dict.fromkeys(arm for arm, _ in sums) if arm != PLAIN]
        for (arm, _), ratio in log_ratios(runs, rows, [(arm, PLAIN) for arm in arms], units).items():
            speeds.setdefault(name, {})[arm] = _speedup(ratio)
    return speeds


def log_ratios(
    runs: Sequence[Row], requests: Sequence[Row], wanted: Sequence[Pair], units: Units
) -> dict[Pair, Estimate]:
    """Return the logarithm of the ratio of speeds, first arm over the other, of each pair.

    Its units are prompts if arms alternate. Otherwise they are rounds, and its error covers rounds and prompts, or only
    rounds if no row has the time of its request. The error is unknown with a single unit, or if one prompt outweighs
    all others.
    """
    ratios = {}
    in_flight = runs[0].get("concurrency", 1) if runs else 1
    by_prompt = alternates(runs)
    speeds: dict[str, dict[int, float]] = {}
    for run in runs:
        speeds.setdefault(run["arm"], {})[run["round"]] = run["tokens"] / run["wall_seconds"]
    for arm, other in wanted:
        over_prompts = _over_prompts(requests, (arm, other), units, in_flight)
        if by_prompt and over_prompts is not None:
            ratios[arm, other] = over_prompts
            continue
        ratio = mean_estimate(np.array([math.log(speeds[arm][n] / speeds[other][n]) for n in sorted(speeds[other])]))
        ratios[arm, other] = ratio if over_prompts is None else combine_errors(ratio, over_prompts)
    return ratios


def _over_prompts(requests: Sequence[Row], pair: Pair, units: Units, in_flight: int) -> Estimate | None:
    """Return the logarithm as seen by the requests of all rounds, with its error over prompts.

    With several in flight it is the error of the runs' wall time. None if the requests have no times.
    """
    timed = [row for row in requests if row["arm"] in pair and row["latency_seconds"] > 0]
    if {row["arm"] for row in timed} != set(pair):
        return None
    keys = [units.get(row["prompt_id"], row["prompt_id"]) for row in timed]
    sums = [
        sum_by_key(keys, np.array([row[name] * (row["arm"] == arm) for row in timed], dtype=np.float64))
        for arm in pair
        for name in ("tokens", "latency_seconds")
    ]
    estimates = jackknife(
        lambda t, s, other_t, other_s: np.log(t / s) - np.log(other_t / other_s), *sums, strata=strata_of(keys)
    )
    if estimates.degrees < 1:  # fewer than two units in effect
        return replace(estimates, error=math.nan)
    return estimates if in_flight == 1 else replace(estimates, error=error_over_prompts(timed, pair, keys, in_flight))


def _factor(estimate: Estimate) -> Difference:
    """Return a factor with its 95 % interval, which is None if the error is unknown."""
    low, high = estimate.interval() or (None, None)
    return Difference(
        value=math.exp(estimate.value),
        low=None if low is None else math.exp(low),
        high=None if high is None else math.exp(high),
    )


def _speedup(estimate: Estimate) -> SetMetrics:
    factor = _factor(estimate)
    return SetMetrics(speedup=factor.value, speedup_low=factor.low, speedup_high=factor.high)


def _latencies(rows: Sequence[Row]) -> dict[str, float]:
    """Return the time to the first token, and tokens/s as a single request sees them."""
    metrics = {}
    first = np.array([row["first_token_seconds"] for row in rows])
    if not np.isnan(first).all():
        metrics["first_token_s_median"] = float(np.nanmedian(first))
        metrics["first_token_s_p95"] = float(np.nanquantile(first, 0.95))
    rates = [row["tokens"] / row["latency_seconds"] for row in rows if row["latency_seconds"] > 0]
    if rates:
        metrics["request_tokens_per_s_median"] = float(np.median(rates))
    return metrics


_RESAMPLES = 200


def error_over_prompts(
    requests: Sequence[Row], pair: tuple[str, str], keys: Sequence[Hashable], in_flight: int
) -> float:
    """Return the bootstrap's standard error of the logarithm of the ratio of speeds.

    Units are resampled within their stratum, and within the rounds that decoded them: each look has its own prompts.
    requests: those of the two arms, in the order in which they were sent. keys: the unit of each request.
    """
    first_sent = {row["prompt_id"]: index for index, row in reversed(list(enumerate(requests)))}
    order = {prompt: index for index, prompt in enumerate(sorted(first_sent, key=first_sent.__getitem__))}
    rounds = {n: index for index, n in enumerate(dict.fromkeys(row["round"] for row in requests))}
    sums = np.zeros((2, 2, len(rounds), len(order) + 1))  # arm, tokens/seconds, round, prompt; the last is empty
    units: dict[Hashable, dict[int, None]] = {}
    first_round: dict[Hashable, int] = {}
    for row, key in zip(requests, keys, strict=True):
        prompt = order[row["prompt_id"]]
        units.setdefault(key, {})[prompt] = None
        first_round[key] = min(row["round"], first_round.get(key, row["round"]))
        sums[pair.index(row["arm"]), :, rounds[row["round"]], prompt] = [row["tokens"], row["latency_seconds"]]
    members = np.full((len(units), max(map(len, units.values()))), len(order))  # filled up with the empty prompt
    for index, unit in enumerate(units.values()):
        members[index, : len(unit)] = list(unit)
    rng, strata = (
        np.random.default_rng(0),
        stratum_indices(list(zip(strata_of(keys), first_round.values(), strict=True))),
    )
    sampled = np.concatenate(
        [stratum[rng.integers(len(stratum), size=(_RESAMPLES, len(stratum)))] for stratum in strata], axis=1
    )
    prompts = members[rng.permuted(sampled, axis=1)].reshape(_RESAMPLES, -1)
    speeds = [tokens[:, prompts].sum(-1) / _wall(seconds[:, prompts], in_flight) for tokens, seconds in sums]
    ratios = np.log(speeds[0] / speeds[1]).mean(0)
    return float(ratios.std(ddof=1)) * (len(units) / (len(units) - len(strata))) ** 0.5


def _wall(seconds: np.ndarray, in_flight: int) -> np.ndarray:
    """Return the time until the last request ends, each sent as soon as another one has ended, over the last axis."""
    runs = seconds.reshape(-1, seconds.shape[-1])
    ends, rows = np.zeros((len(runs), in_flight)), np.arange(len(runs))
    for latencies in runs.T:
        ends[rows, ends.argmin(-1)] += latencies
    return ends.max(-1).reshape(seconds.shape[:-1])
