"""Which of many answers are used: quotas by source, a bound on all, and an order in which they are taken."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np


def lot(seed: int, content: bytes) -> int:
    """63 bits that rank an answer among others, by seed and content alone: smaller ones are drawn first."""
    return int.from_bytes(hashlib.sha256(f"lot {seed} ".encode() + content).digest()[:8], "big") >> 1


def choose(
    order: np.ndarray, sources: Sequence[str], quotas: Mapping[str, float], rows: int | None = None
) -> np.ndarray:
    """[n] bool: which of n answers are used.

    order: [n], positions in the order in which they are taken. sources: [n], of each answer. quotas: the most from a
    source, below 1 a share of all that are used, from 1 on a number. rows: the most of all.
    """
    total, left = _most(Counter(sources), quotas, rows)
    chosen = np.zeros(len(sources), dtype=bool)
    for position in order:
        if total == 0:
            break
        if left[sources[position]] > 0:
            chosen[position] = True
            left[sources[position]] -= 1
            total -= 1
    return chosen


def _most(there: Mapping[str, int], quotas: Mapping[str, float], rows: int | None) -> tuple[int, dict[str, int]]:
    """Of all, and of each source. A share is of what is used in the end, which shares make smaller."""
    total = sum(there.values()) if rows is None else min(sum(there.values()), rows)
    while True:
        most = {name: min(count, _bound(quotas.get(name), total)) for name, count in there.items()}
        if sum(most.values()) >= total:
            return total, most
        total = sum(most.values())


def _bound(quota: float | None, total: int) -> int:
    if quota is None:
        return total
    return int(quota * total + 1e-9) if quota < 1 else int(quota)
