"""Drift: whether the champion is still worth what it was worth when it was promoted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from draftsmith.stages.contract import Config, Operational
from draftsmith.stages.drafters.config import DraftingConfig

_MOST_NAMES = 5  # of prompt sets in a sentence


class DriftConfig(Config):
    """When a refresh goes on."""

    threshold: Annotated[
        float, Field(ge=0, le=1, description="share of its tau that the champion may have lost"), Operational()
    ] = 0.03
    max_age_days: Annotated[
        float,
        Field(gt=0, description="the line is refreshed anyway if its last refresh, promoted or not, is longer ago"),
        Operational(),
    ] = 90.0
    drafting: DraftingConfig = DraftingConfig()
    tokens_per_target_forward: Annotated[int, Field(ge=1)] = 4096


def fallen(drift: Mapping[str, Any], reference: Mapping[str, Any], threshold: float) -> list[str]:
    """The sets in which tau fell by more than `threshold` of what it was, in words; `all` for all prompts.

    drift: of `drift.json`: set -> tau, low, high (95 %). reference: the same at the promotion. A set that was not
    measured then says nothing; one whose whole interval lies below the limit has fallen.
    """
    said = []
    for name, now in drift.items():
        before = (reference.get(name) or {}).get("tau")
        if before is None or now["high"] is None:
            continue
        limit = (1 - threshold) * before
        if now["high"] < limit:
            said.append(f"{name}: tau {now['tau']:.3f} (at most {now['high']:.3f}), {before:.3f} at its promotion")
    return said


def unjudged(drift: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """The sets of which `fallen` says nothing, whatever became of them, in words, by the reason."""
    unknown = [name for name in drift if (reference.get(name) or {}).get("tau") is None]
    few = [name for name, now in drift.items() if now["high"] is None and name not in unknown]
    gone = [name for name in reference if name not in drift]
    return [
        f"not judged, {why}: {len(names)} set{'s' * (len(names) != 1)} ({', '.join(names[:_MOST_NAMES])}"
        f"{', …' * (len(names) > _MOST_NAMES)})"
        for why, names in (
            ("for want of a figure at its promotion", unknown),
            ("for want of prompts", few),
            ("no longer asked", gone),
        )
        if names
    ]
