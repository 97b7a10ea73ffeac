"""Formats values for screens and errors: durations, sizes, shortened values, nested fields by dotted path."""

from __future__ import annotations

import json
from collections.abc import Mapping

MAX_CHARS = 60


def format_duration(seconds: float) -> str:
    """Return `8 s`, `2 min 05 s` or `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_bytes(count: float) -> str:
    """Return a number of bytes as `812 B` or `3.4 MB`."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def shorten(value: object, max_chars: int = MAX_CHARS) -> str:
    """Return a string as it is, any other value as JSON, cut to `max_chars`."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"


def flatten(value: object, prefix: str = "") -> dict[str, object]:
    """Return the fields of a nested value by dotted path. An empty mapping or list counts as a value."""
    if isinstance(value, Mapping) and (value or not prefix):
        items = list(value.items())
    elif isinstance(value, list) and any(isinstance(item, (dict, list)) for item in value):
        items = list(enumerate(value))
    else:
        return {prefix: value}
    fields: dict[str, object] = {}
    for name, item in items:
        fields |= flatten(item, f"{prefix}.{name}" if prefix else str(name))
    return fields
