"""Stage `drift`: the champion replayed on fresh answers of today's target. Minutes, before anything is spent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field
from scipy.special import stdtrit

from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.runtime.stage import Compute, Config, FilledIn, NotInKey, Stage, StageContext, progress_callback
from draftsmith.stages.runtime.statistics import CONFIDENCE, simultaneous_level


def run(ctx: StageContext, config: DriftConfig) -> None:
    """Write `drift.json`: tau with its 95 % interval over prompts, of all answers and of each prompt set."""
    from draftsmith.stages.data.held_out import independent_units
    from draftsmith.stages.data.load import DRAFTER_FOLDER, load_trajectories, prompt_sets
    from draftsmith.stages.drafters.checkpoint import load_drafter
    from draftsmith.stages.evaluation.acceptance import tau_by_set
    from draftsmith.stages.replay.options import ReplayOptions
    from draftsmith.stages.replay.replayer import Replayer
    from draftsmith.stages.target.causal_lm import Target

    stored = load_trajectories(ctx.inputs["trajectories"], ["heldout"])
    target = Target.load(ctx.inputs["target"])
    champion = {"champion": load_drafter(ctx.inputs["champion"] / DRAFTER_FOLDER, target)}
    options = ReplayOptions(config.drafting, stored.sampling, with_proposals=False)
    tallies = Replayer(target, options, ctx.log).acceptance(
        champion, stored.trajectories, progress=progress_callback(ctx, "trajectories"), cache=ctx.work / "replayed"
    )
    sets, units = (
        prompt_sets(ctx.inputs["prompts"], stored.prompts),
        independent_units(ctx.inputs["prompts"], stored.prompts),
    )
    found = {
        name: figures["champion"]
        for of in ([ALL] * len(sets), sets)
        for name, figures in tau_by_set(tallies, units, of).items()
    }
    (ctx.out / "drift.json").write_text(json.dumps(found, indent=2) + "\n")
    ctx.log(", ".join(f"{name}: tau {figures['tau']:.3f}" for name, figures in found.items()))
    ctx.summary(tau=found[ALL]["tau"] or 0.0, prompts=found[ALL]["prompts"] or 0)


ALL = "all"  # prompts, beside the single sets
_MOST_NAMES = 5  # of prompt sets in a sentence


class DriftConfig(Config):
    """When a refresh goes on."""

    threshold: Annotated[
        float, Field(ge=0, le=1, description="share of its tau that the champion may have lost"), NotInKey()
    ] = 0.03
    max_age_days: Annotated[
        float,
        Field(gt=0, description="the line is refreshed anyway if its last refresh, promoted or not, is longer ago"),
        NotInKey(),
    ] = 90.0
    drafting: Annotated[DraftingConfig, FilledIn()] = DraftingConfig()
    """As drafters draft in the evaluation."""


def fallen(drift: Mapping[str, Any], reference: Mapping[str, Any], threshold: float) -> list[str]:
    """The sets in which tau fell by more than `threshold` of what it was, in words; `all` for all prompts.

    drift: of `drift.json`: set -> tau, low, high (95 %), prompts. reference: the same at the promotion. Both have an
    error, as they are of different prompts; the single sets share theirs (Bonferroni), so that one is named in at most
    5 % of checks where nothing fell.
    """
    judged = [name for name in drift if _known(drift, name) and _known(reference, name)]
    shared = 0.5 + simultaneous_level(sum(name != ALL for name in judged)) / 2
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


STAGE = Stage(
    name="drift",
    config=DriftConfig,
    inputs=("target", "champion", "prompts", "trajectories"),
    body=__name__,
    compute=Compute.HEAVY,
)
