"""OPD: on-policy distillation of the target's feedback on the blocks that the drafter's own verification leads to.

After Draft-OPD, arXiv 2605.29343: draft from positions where verification goes on (mined, or found under the current
weights), with gradient, and learn from what the target said about accepted and rejected proposals.
"""

from __future__ import annotations

from draftsmith.stages.runtime.stage import Compute, Stage, StageContext
from draftsmith.stages.training.config import OpdConfig


def run(ctx: StageContext, config: OpdConfig) -> None:
    """Continue training the drafter that was mined, on its own steps."""
    import torch

    from draftsmith.stages.data.load import DRAFTER_FOLDER, load_trajectories
    from draftsmith.stages.drafters.base import DrafterInfo
    from draftsmith.stages.drafters.checkpoint import descends_from, load_drafter, save_drafter
    from draftsmith.stages.runtime.ranks import Ranks
    from draftsmith.stages.target.causal_lm import Target
    from draftsmith.stages.training.estimate import micro_batch_tokens
    from draftsmith.stages.training.loop import MicroBatches, train
    from draftsmith.stages.training.opd.mined_table import load_mined
    from draftsmith.stages.training.opd.trainer import OpdTraining

    ranks = Ranks.current(config.parallel.target_parallel)
    stored = load_trajectories(ctx.inputs["trajectories"])
    target = Target.load(ctx.inputs["target"], ranks=ranks)
    folder = ctx.inputs["drafter"] / DRAFTER_FOLDER
    drafter = load_drafter(folder, target, torch.float32)
    mined = load_mined(ctx.inputs["mined"], stored.trajectories, drafter.block_size, whole=config.reads_table)
    training = OpdTraining(
        drafter,
        target,
        stored.trajectories,
        mined,
        config,
        sampling=stored.sampling,
        seed=ctx.seed,
        ranks=ranks,
    )
    ctx.log(str(training))
    longest = int(stored.trajectories.lengths.max())
    limit = micro_batch_tokens(config, target, drafter, longest)
    blocks = config.anchors_per_sequence * drafter.block_size  # tokens of a row beside its trajectory
    micro_batches = MicroBatches(training.micro_batches, limit, blocks, ctx.log, ctx.work)
    totals = train(ctx, drafter, config, micro_batches, training.source, ranks)
    if not ranks.is_main:
        return
    drafter.info = DrafterInfo(
        target_digest=target.info.digest,
        target_source=target.info.source,
        parents=descends_from(folder),
        training={"stage": "opd", "steps": config.steps, "blocks": totals["blocks"], "positions": totals["positions"]},
    )
    save_drafter(drafter, ctx.out / DRAFTER_FOLDER, target.dtype)
    ctx.summary(**totals, mined_steps=mined.count(training.kind), passes=training.passes)


STAGE = Stage(
    name="opd",
    config=OpdConfig,
    inputs=("target", "drafter", "trajectories", "mined"),
    body=__name__,
    compute=Compute.HEAVY,
    parallel=lambda config: config.parallel,
)
