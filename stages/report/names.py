"""Names of variants and formats of numbers, the same on the screen, in the report and in `review.json`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any

from draftsmith.artifacts.results.evaluation import CHAMPION, PLAIN

NAMES = {
    PLAIN: "without a drafter",
    CHAMPION: "champion",
    "sft": "SFT",
    "opd": "SFT + OPD",
    "control": "SFT continued",
}
ABSENT = "—"


def name_of(arm: str) -> str:
    """Return the name of a variant; one of `draftsmith evaluate` keeps its own."""
    return NAMES.get(arm, arm)


def in_words(arm: str) -> str:
    """Return the name of a variant inside a sentence, after a preposition."""
    return {CHAMPION: "the champion", PLAIN: "no drafter"}.get(arm, name_of(arm))


def target_name(source: str) -> str:
    """Return the name of a target without its path, or the organisation before it."""
    return source.rstrip("/").rpartition("/")[2]


def number(value: Any, form: str) -> str:
    """Return a formatted number, or `ABSENT` if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return ABSENT
    return format(value, form)


def interval(numbers: Iterable[Any], form: str) -> str:
    """Return a value with its low and high end in brackets, where they are known; a line may break before them.

    From 100 on they have no decimals, so that a wide interval does not make a wide column.
    """
    wide = re.sub(r"\.\df$", ".0f", form)
    value, *ends = (number(each, wide if each is not None and abs(each) >= 100 else form) for each in numbers)
    return value if ABSENT in (value, *ends) else f"{value}\n[{', '.join(ends)}]"


def duration(seconds: float) -> str:
    """Return `12 s`, `6 min` or `2.5 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
