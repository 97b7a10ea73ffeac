"""Drift: whether the champion is still worth what it was worth when it was promoted."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from scipy.special import stdtrit

from draftsmith.stages.contract import Config, Operational
from draftsmith.stages.drafters.config import DraftingConfig
from draftsmith.stages.replay.options import TokensPerForward
from draftsmith.stages.statistics import CONFIDENCE, simultaneous

ALL = "all"  # prompts, beside the single sets
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
    tokens_per_target_forward: TokensPerForward = 4096


def fallen(drift: Mapping[str, Any], reference: Mapping[str, Any], threshold: float) -> list[str]:
    """The sets in which tau fell by more than `threshold` of what it was, in words; `all` for all prompts.

    drift: of `drift.json`: set -> tau, low, high (95 %), prompts. reference: the same at the promotion. Both have an
    error, as they are of different prompts; the single sets share theirs (Bonferroni), so that one is named in at most
    5 % of checks where nothing fell.
    """
    judged = [name for name in drift if _known(drift, name) and _known(reference, name)]
    shared = 0.5 + simultaneous(sum(name != ALL for name in judged)) / 2
    said = []
    for name in judged:
        now, before, kept = drift[name], reference[name], 1 - threshold
        reach = math.hypot(now["high"] - now["tau"], kept * (before["tau"] - before["low"]))
        fewest = min(now["prompts"], before.get("prompts", now["prompts"]))  # the wider tail for both errors
        single, wider = stdtrit(fewest - 1, [0.5 + CONFIDENCE / 2, shared])
        if now["tau"] + reach * (1 if name == ALL else wider / single) < kept * before["tau"]:
            was = f"{before['tau']:.3f} at its promotion (at least {before['low']:.3f})"
            said.append(f"{name}: tau {now['tau']:.3f} (at most {now['high']:.3f}), {was}")
    return said


def _known(figures: Mapping[str, Any], name: str) -> bool:
    """A single prompt has a tau, and no interval."""
    return (figures.get(name) or {}).get("low") is not None


def unjudged(drift: Mapping[str, Any], reference: Mapping[str, Any]) -> list[str]:
    """The sets of which `fallen` says nothing, whatever became of them, in words, by the reason."""
    unknown = [name for name in drift if (reference.get(name) or {}).get("tau") is None]
    few = [name for name in drift if name not in unknown and not (_known(drift, name) and _known(reference, name))]
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
