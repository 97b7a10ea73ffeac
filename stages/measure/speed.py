"""The speed table: tokens/s, speed-up with an interval over prompts, latencies, and what drafting gave."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from draftsmith.stages.measure.bootstrap import interval
from draftsmith.stages.measure.requests import PLAIN, Setting

FIRST = "sft"  # the drafter that a refresh begins with: the others' speed is compared with it too
_SUMMED = ("tokens", "seconds", "draft_seconds", "verify_seconds", "verify_steps")


def speed_by_setting(
    rows: Sequence[Mapping[str, Any]],
    settings: Sequence[Setting],
    resamples: int,
    seed: int,
) -> list[dict[str, Any]]:
    """`speed_table` of every setting, in their order."""
    found = []
    for setting in settings:
        chosen = [r for r in rows if (r["temperature"], r["concurrency"]) == (setting.temperature, setting.concurrency)]
        arms = speed_table(chosen, resamples, seed)
        found.append({"temperature": setting.temperature, "concurrency": setting.concurrency, "arms": arms})
    return found


def speed_table(rows: Sequence[Mapping[str, Any]], resamples: int, seed: int) -> dict[str, dict[str, Any]]:
    """Figures of each arm at one setting; figures that no row has (latencies, accepted lengths) are left out.

    Speed-ups are over plain decoding, `speed_to_sft` over the drafter of that name, both paired over prompts.

    Rounds are repetitions, not further prompts: they are summed prompt by prompt before intervals are drawn.
    """
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
    order = list(dict.fromkeys(row["prompt_id"] for row in by_arm[PLAIN]))
    columns = {arm: _sums_by_prompt(by_arm[arm], order) for arm in arms}
    plain = columns[PLAIN]
    table: dict[str, dict[str, Any]] = {}
    for arm, c in columns.items():
        tokens, seconds = c["tokens"].sum(), c["seconds"].sum()
        table[arm] = {"tokens_per_s": float(tokens / seconds), "prompts": len(order), **_latencies(by_arm[arm])}
        if arm == PLAIN:
            continue
        samples = (c["tokens"], c["seconds"], plain["tokens"], plain["seconds"])
        low, high = interval(_speedup, samples, resamples, seed)
        table[arm] |= {"speedup": float(_speedup(*samples)), "speedup_low": low, "speedup_high": high}
        if arm != FIRST and FIRST in columns:
            samples = (c["tokens"], c["seconds"], columns[FIRST]["tokens"], columns[FIRST]["seconds"])
            low, high = interval(_speedup, samples, resamples, seed)
            table[arm] |= {
                "speed_to_sft": float(_speedup(*samples)),
                "speed_to_sft_low": low,
                "speed_to_sft_high": high,
            }
        if c["verify_seconds"].any():  # servers do not say
            steps = max(1.0, c["verify_steps"].sum())
            table[arm]["draft_ms_per_step"] = float(1e3 * c["draft_seconds"].sum() / steps)
            table[arm]["verify_ms_per_step"] = float(1e3 * c["verify_seconds"].sum() / steps)
            table[arm]["draft_share"] = float(c["draft_seconds"].sum() / seconds)
            table[arm]["verify_share"] = float(c["verify_seconds"].sum() / seconds)
        # the prefill's token is committed before any verify step
        table[arm]["tau_served"] = float((tokens - len(by_arm[arm])) / max(1.0, c["verify_steps"].sum()))
        identical = [row["identical"] for row in by_arm[arm] if row["identical"] is not None]
        table[arm]["identical_share"] = sum(identical) / len(identical) if identical else None
        block_size = by_arm[arm][0]["block_size"]
        lengths = [n for row in by_arm[arm] for n in row["accepted"] or ()]
        if lengths:
            table[arm]["accepted_histogram"] = np.bincount(lengths, minlength=block_size).tolist()
        table[arm]["block_size"] = block_size
    return table


def _sums_by_prompt(rows: Sequence[Mapping[str, Any]], order: Sequence[str]) -> dict[str, np.ndarray]:
    """[prompts] of each summed column, in the order of the prompts."""
    place = {prompt_id: i for i, prompt_id in enumerate(order)}
    sums = {name: np.zeros(len(order)) for name in _SUMMED}
    for row in rows:
        for name in _SUMMED:
            sums[name][place[row["prompt_id"]]] += row[name]
    return sums


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


def _speedup(
    tokens: np.ndarray, seconds: np.ndarray, plain_tokens: np.ndarray, plain_seconds: np.ndarray, axis: int = -1
) -> np.ndarray:
    return (tokens.sum(axis) / seconds.sum(axis)) / (plain_tokens.sum(axis) / plain_seconds.sum(axis))
