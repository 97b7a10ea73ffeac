"""Body of stage `drift`: the champion's tau by replay."""

from __future__ import annotations

from draftsmith.artifacts.results.evaluation import CHAMPION, DriftResult
from draftsmith.stages.data.held_out import independent_units
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, load_trajectories, prompt_labels
from draftsmith.stages.drafters.checkpoint import load_drafter
from draftsmith.stages.evaluation.acceptance import tau_by_slice
from draftsmith.stages.evaluation.drift import DriftConfig
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import Replayer
from draftsmith.stages.runtime.stage import StageContext, progress_callback
from draftsmith.stages.target.causal_lm import Target


def run(ctx: StageContext, config: DriftConfig) -> None:
    """Write `drift.json`: tau with its 95 % interval over prompts, of all answers and of each slice."""
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
