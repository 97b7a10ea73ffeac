"""How long turns with several requests in flight would have taken with other prompts.

Such a turn ends when its slowest request ends: few of its prompts decide what it takes, which sums over them do not
tell. Here the requests of drawn prompts are put in flight again, each for as long as it took.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

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
