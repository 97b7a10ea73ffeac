"""Stage `drift`: the champion replayed on fresh answers of today's target, in minutes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from draftsmith.artifacts.results.evaluation import CHAMPION, DriftResult
from draftsmith.stages.data.held_out import independent_units
from draftsmith.stages.data.stored_prompts import prompt_labels
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories
from draftsmith.stages.drafters.spec import DraftingConfig
from draftsmith.stages.evaluation.acceptance import tau_by_slice
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.runtime.stage import Compute, Config, FilledIn, NotInKey, Stage, StageContext, progress_callback


class DriftConfig(Config):
    """The conditions for a refresh to continue."""

    threshold: Annotated[
        float, Field(ge=0, le=1, description="share of its tau that the champion may have lost"), NotInKey()
    ] = 0.03
    max_age_days: Annotated[
        float,
        Field(gt=0, description="refresh the line anyway if its last refresh, promoted or not, is older"),
        NotInKey(),
    ] = 90.0
    drafting: Annotated[DraftingConfig, FilledIn()] = DraftingConfig()
    """As drafters draft in the evaluation."""


def run(ctx: StageContext, config: DriftConfig) -> None:
    """Write `drift.json`: tau with its 95 % interval over prompts, for all answers and for each slice."""
    # these load torch, and planning reads this module
    from draftsmith.stages.drafters.checkpoint import load_drafter
    from draftsmith.stages.replay.replayer import Replayer
    from draftsmith.stages.targets.causal_lm import Target

    stored = load_trajectories(ctx.inputs["trajectories"], ["heldout"])
    target = Target.load(ctx.inputs["target"])
    champion = {CHAMPION: load_drafter(ctx.inputs["champion"] / DRAFTER_FOLDER, target)}
    options = ReplayOptions(config.drafting, stored.sampling, with_proposals=False)
    tallies = Replayer(target, options, ctx.log).acceptance(
        champion, stored.trajectories, progress=progress_callback(ctx, "trajectories"), cache=ctx.work / "replayed"
    )
    prompts = ctx.inputs["prompts"]
    units, labels = independent_units(prompts, stored.prompts), prompt_labels(prompts, stored.prompts)
    by_slice = tau_by_slice(tallies, units, labels)
    result = DriftResult({name: arms[CHAMPION] for name, arms in by_slice.items()})
    result.write(ctx.out)
    ctx.log(", ".join(f"{name}: tau {metrics.tau or 0.0:.3f}" for name, metrics in result.root.items()))
    ctx.summary(tau=result.overall.tau or 0.0, prompts=result.overall.prompts or 0)


STAGE = Stage(
    name="drift",
    config=DriftConfig,
    inputs=("target", "champion", "prompts", "trajectories"),
    body="draftsmith.stages.evaluation.drift",
    compute=Compute.HEAVY,
)
