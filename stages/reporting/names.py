"""Names of variants and forms of figures, the same on the screen, in the report and in `review.json`."""

from __future__ import annotations

import math
from typing import Any

NAMES = {
    "plain": "no drafter",
    "champion": "champion",
    "sft": "SFT",
    "opd": "SFT + OPD",
    "control": "SFT continued",
}
ABSENT = "—"


def name_of(arm: str) -> str:
    """Return what readers call a variant; one of `draftsmith evaluate` has its own name."""
    return NAMES.get(arm, arm)


def number(value: Any, form: str) -> str:
    """Return a formatted figure, or `ABSENT` if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ABSENT
    return format(value, form)


def interval(value: Any, low: Any, high: Any, form: str) -> str:
    """Return a figure with its interval in brackets, where there is one; a line may be broken before it."""
    text, ends = number(value, form), (number(low, form), number(high, form))
    return text if ABSENT in (text, *ends) else f"{text}\n[{ends[0]}, {ends[1]}]"


def duration(seconds: float) -> str:
    """Return `12 s`, `6 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
