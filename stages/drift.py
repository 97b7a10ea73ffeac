"""Stage `drift`: the champion replayed on fresh answers of today's target. Minutes, before anything is spent."""

from __future__ import annotations

import json

from draftsmith.stages.contract import Compute, Stage, StageContext, follow
from draftsmith.stages.measure.drift import ALL, DriftConfig


def run(ctx: StageContext, config: DriftConfig) -> None:
    """Write `drift.json`: tau with its 95 % interval over prompts, of all answers and of each prompt set."""
    from draftsmith.stages.drafters.checkpoint import load_drafter
    from draftsmith.stages.measure.acceptance import tau_by_set
    from draftsmith.stages.prompting.held_out import units_of
    from draftsmith.stages.replay.options import ReplayOptions
    from draftsmith.stages.replay.replayer import Replayer
    from draftsmith.stages.stored import DRAFTER_FOLDER, load_trajectories, sets_of
    from draftsmith.stages.targets.causal_lm import Target

    stored = load_trajectories(ctx.inputs["trajectories"], ["heldout"])
    target = Target.load(ctx.inputs["target"])
    champion = {"champion": load_drafter(ctx.inputs["champion"] / DRAFTER_FOLDER, target)}
    options = ReplayOptions(config.drafting, stored.law, with_proposals=False)
    tallies = Replayer(target, options, ctx.log).tally(
        champion, stored.trajectories, progress=follow(ctx, "trajectories"), kept=ctx.work / "replayed"
    )
    sets, units = sets_of(ctx.inputs["prompts"], stored.prompts), units_of(ctx.inputs["prompts"], stored.prompts)
    found = {
        name: figures["champion"]
        for of in ([ALL] * len(sets), sets)
        for name, figures in tau_by_set(tallies, units, of).items()
    }
    (ctx.out / "drift.json").write_text(json.dumps(found, indent=2) + "\n")
    ctx.log(", ".join(f"{name}: tau {figures['tau']:.3f}" for name, figures in found.items()))
    ctx.summary(tau=found[ALL]["tau"] or 0.0, prompts=found[ALL]["prompts"] or 0)


STAGE = Stage(
    name="drift",
    config=DriftConfig,
    inputs=("target", "champion", "prompts", "trajectories"),
    run=run,
    compute=Compute.HEAVY,
)
