"""Values in few words, for screens and errors: durations, sizes, long values cut, nested ones by dotted path."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

MAX_CHARS = 60  # characters of a value


def format_duration(seconds: float) -> str:
    """Return `8 s`, `2 min 05 s` or `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_bytes(count: float) -> str:
    """Return bytes as `812 B` or `3.4 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def shorten(value: Any, most: int = MAX_CHARS) -> str:
    """Return a text as it is and any other value as JSON, cut to so many characters."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return fields by their dotted path. What holds nothing stays a value, so that it can differ too."""
    if isinstance(value, Mapping) and (value or not prefix):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(each, (dict, list)) for each in value):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    found: dict[str, Any] = {}
    for name, each in items:
        found |= flatten(each, f"{prefix}.{name}" if prefix else str(name))
    return found
