"""Names of variants and forms of figures, the same on the screen, in the report and in `review.json`."""

from __future__ import annotations

import math
from collections.abc import Iterable
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


def in_words(arm: str) -> str:
    """Return the same as a sentence says it."""
    return "the champion" if arm == "champion" else name_of(arm)


def target_name(source: str) -> str:
    """Return the name of a target without its path, or the organisation before it."""
    return source.rstrip("/").rpartition("/")[2]


def number(value: Any, form: str) -> str:
    """Return a formatted figure, or `ABSENT` if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ABSENT
    return format(value, form)


def interval(figures: Iterable[Any], form: str) -> str:
    """Return a value with its low and high end in brackets, where they are there; a line may be broken before them."""
    value, *ends = (number(each, form) for each in figures)
    return value if ABSENT in (value, *ends) else f"{value}\n[{', '.join(ends)}]"


def duration(seconds: float) -> str:
    """Return `12 s`, `6 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
