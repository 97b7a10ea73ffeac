"""Acceptance of several drafters on identical trajectories: paired, so that small differences become visible."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from draftsmith.stages.evaluation.gate_rules import CHAMPION, as_figures, compared
from draftsmith.stages.evaluation.verdicts import Pair, pairs
from draftsmith.stages.replay.stats import AcceptanceStats
from draftsmith.stages.runtime.statistics import Estimate, jackknife, ratio, ratio_difference, ratio_gain, sum_by_key

_MULTIPLIER = np.uint64(6364136223846793005)  # odd; products wrap


def has_loop(tokens: Sequence[int], n: int = 6, times: int = 3) -> bool:
    """Does the answer repeat an n-gram `times` times (at least twice)? Its tau may then say little about other text."""
    ids, count = np.asarray(tokens, dtype=np.uint64), len(tokens) - n + 1
    if count < times:
        return False
    hashes = np.zeros(count, dtype=np.uint64)
    for k in range(n):
        hashes = hashes * _MULTIPLIER + ids[k : k + count]
    hashes.sort()
    if not (hashes[times - 1 :] == hashes[: count - times + 1]).any():  # equal n-grams have equal hashes
        return False
    grams = Counter(tuple(tokens[i : i + n]) for i in range(count))
    return max(grams.values()) >= times


def acceptance_table(
    tallies: Mapping[str, AcceptanceStats], prompts: Sequence[str], looping: Sequence[bool]
) -> dict[str, dict[str, Any]]:
    """Figures of each drafter, with 95 % intervals over prompts; differences to others are paired.

    prompts, looping: of each trajectory, the id of its prompt, and whether its answer repeats itself. A single prompt
    has no interval.
    """
    keep = ~np.asarray(looping)
    differences = tau_differences(tallies, prompts)
    table: dict[str, dict[str, Any]] = {}
    for name, found in tallies.items():
        tau = jackknife(ratio, *_by_prompt(found, prompts))
        low, high = tau.interval() or (None, None)
        table[name] = {
            "tau": tau.value,
            "tau_low": low,
            "tau_high": high,
            "prompts": tau.units,
            "verify_steps": int(found.steps.sum()),
            "block_size": found.block_size,
            "acceptance_by_offset": [
                float(found.accepted[k:].sum() / max(1, found.judged[k:].sum())) for k in range(1, found.block_size)
            ],
            "accepted_histogram": found.accepted.tolist(),
            "tau_without_loops": (float(found.committed[keep].sum() / found.steps[keep].sum()) if keep.any() else None),
            "differences": {},
        }
        for (arm, other), difference in differences.items():
            if arm == name:
                low, high = difference.interval() or (None, None)
                table[name]["differences"][other] = {"value": difference.value, "low": low, "high": high}
    return table


def tau_differences(tallies: Mapping[str, AcceptanceStats], prompts: Sequence[str]) -> dict[Pair, Estimate]:
    """`tau_difference` of each compared pair."""
    return {(arm, other): tau_difference(tallies[arm], tallies[other], prompts) for arm, other in pairs(list(tallies))}


def tau_difference(tally: AcceptanceStats, other: AcceptanceStats, prompts: Sequence[str] | None = None) -> Estimate:
    """tau of a drafter minus that of another one on the same trajectories, paired over prompts.

    prompts: the id of each trajectory's prompt; left out: every trajectory has its own.
    """
    prompts = [str(index) for index in range(len(tally.steps))] if prompts is None else prompts
    return jackknife(ratio_difference, *_by_prompt(tally, prompts), *_by_prompt(other, prompts))


def tau_by_set(
    tallies: Mapping[str, AcceptanceStats], prompts: Sequence[str], sets: Sequence[str]
) -> dict[str, dict[str, dict[str, float | int | None]]]:
    """Set -> drafter -> tau with its 95 % interval over prompts. sets: of each trajectory."""
    found: dict[str, dict[str, dict[str, float | int | None]]] = {}
    for name in dict.fromkeys(sets):
        places = _places(sets, name)
        for arm, tally in tallies.items():
            tau = jackknife(ratio, *_by_prompt(tally, prompts, places))
            low, high = tau.interval() or (None, None)
            found.setdefault(name, {})[arm] = {"tau": tau.value, "low": low, "high": high, "prompts": tau.units}
    return found


def taus_compared(
    tallies: Mapping[str, AcceptanceStats], prompts: Sequence[str], sets: Sequence[str]
) -> list[dict[str, Any]]:
    """Every drafter against the champion, over all prompts (set None) and within each set; empty without a champion."""
    if CHAMPION not in tallies:
        return []
    found = []
    for name in (None, *dict.fromkeys(sets)):
        places = _places(sets, name)
        champion = _by_prompt(tallies[CHAMPION], prompts, places)
        base = float(ratio(*(sums.sum() for sums in champion)))
        for arm, tally in tallies.items():
            if arm != CHAMPION:
                difference = jackknife(ratio_difference, *_by_prompt(tally, prompts, places), *champion)
                gain = jackknife(ratio_gain, *_by_prompt(tally, prompts, places), *champion)
                found.append(compared("tau", arm, CHAMPION, difference, set=name, base=base, gain=as_figures(gain)))
    return found


def _places(sets: Sequence[str], name: str | None) -> np.ndarray:
    """Indices of the trajectories of one set; of all for None."""
    return np.array([index for index, each in enumerate(sets) if name is None or each == name], dtype=np.int64)


def _by_prompt(
    tally: AcceptanceStats, prompts: Sequence[str], places: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """[prompts] committed tokens and verify steps of all answers to each prompt; of some trajectories alone."""
    if places is None:
        return sum_by_key(prompts, tally.committed), sum_by_key(prompts, tally.steps)
    chosen = [prompts[index] for index in places]
    return sum_by_key(chosen, tally.committed[places]), sum_by_key(chosen, tally.steps[places])
