"""Drift: whether the champion is still worth what it was worth when it was promoted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field

from draftsmith.stages.contract import Config, Operational
from draftsmith.stages.drafters.config import DraftingConfig


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
