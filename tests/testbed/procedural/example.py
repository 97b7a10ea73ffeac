"""What every family of procedural text makes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One request and the answer that a target is taught."""

    family: str
    prompt: str
    answer: str
