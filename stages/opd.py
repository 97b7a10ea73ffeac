"""OPD: on-policy distillation of the target's feedback at the positions where verification exposed the drafter.

Draft-OPD, arXiv 2605.29343: replay the drafter at mined anchors, with gradient, and learn from what the target said
about accepted and rejected proposals.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stages.contract import Stage, StageContext
from stages.training.config import TrainingConfig


class OpdConfig(TrainingConfig):
    """What is distilled, and where."""

    steps: Annotated[int, Field(ge=1)] = 400
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    loss: Annotated[
        Literal["matched", "paper"],
        Field(
            description="matched: the offsets that verification reached, in the form that fits its rule; "
            "paper: Bernoulli forward KL on these plus k3 reverse KL on the rejected suffix"
        ),
    ] = "matched"
    verification: Annotated[
        Literal["auto", "greedy", "sampled"],
        Field(description="the rule that the drafter will serve under; auto: as the trajectories were drawn"),
    ] = "auto"
    anchors: Annotated[
        Literal["errors", "visited"],
        Field(description="verify steps that rejected something, or all that were visited"),
    ] = "errors"
    delta: Annotated[float, Field(gt=0, le=1, description="weight δ^(k-1) of the rejected stream")] = 0.8
    weight_accepted: Annotated[float, Field(ge=0)] = 1.0
    weight_rejected: Annotated[float, Field(ge=0)] = 1.0


def run(ctx: StageContext, config: OpdConfig) -> None:
    """Continue training the drafter that was mined, on its own mined steps."""
    import torch

    from stages.drafters.base import DrafterInfo
    from stages.drafters.checkpoint import drafter_digest, load_drafter, read_info, save_drafter
    from stages.stored import DRAFTER_FOLDER, load_trajectories
    from stages.targets.causal_lm import Target
    from stages.training.batches import FeatureSource, step_rng, trajectories_of_step
    from stages.training.loop import train
    from stages.training.mined import load_mined
    from stages.training.objectives import LossReport, OpdObjective, opd_loss
    from stages.training.vocabulary import training_head

    stored = load_trajectories(ctx.inputs["trajectories"])
    target = Target.load(ctx.inputs["target"])
    folder = ctx.inputs["drafter"] / DRAFTER_FOLDER
    drafter = load_drafter(folder, target, torch.float32)
    table = load_mined(ctx.inputs["steps"], stored.trajectories, drafter.block_size)
    usable = table.trajectories_with(config.anchors)
    objective = OpdObjective(
        loss=config.loss,
        sampled=config.verification == "sampled" or (config.verification == "auto" and stored.temperature > 0),
        temperature=stored.temperature or 1.0,
        delta=config.delta,
        weight_accepted=config.weight_accepted,
        weight_rejected=config.weight_rejected,
    )
    ctx.log(
        f"loss {config.loss}, verification {'sampled' if objective.sampled else 'greedy'}, anchors {config.anchors}: "
        f"{table.count(config.anchors)} mined steps in {len(usable)} trajectories"
    )
    features = FeatureSource(
        target,
        drafter.target_layer_ids,
        stored.trajectories,
        tokens_per_group=config.tokens_per_target_forward,
        memory_mb=config.feature_memory_mb,
    )

    def loss_of_step(step: int) -> LossReport:
        rng = step_rng(ctx.seed, step)
        chosen = [usable[i] for i in trajectories_of_step(len(usable), config.sequences_per_step, step, ctx.seed)]
        batch = features.batch(chosen)
        anchors, mined = table.draw(chosen, config.anchors, config.anchors_per_sequence, rng, target.device)
        needed = [batch.tokens, mined.proposed] if config.loss == "paper" else [batch.tokens]
        head = training_head(target.head_weight, drafter.frequent_tokens, config, rng, needed)
        return opd_loss(
            drafter,
            batch,
            anchors,
            mined,
            head,
            target.head_weight,
            objective,
            positions_per_chunk=config.positions_per_chunk,
        )

    totals = train(ctx, drafter, config, loss_of_step)
    drafter.info = DrafterInfo(
        target_digest=target.info.digest,
        target_source=target.info.source,
        parents=(*read_info(folder).parents, drafter_digest(folder)),
        training={"stage": "opd", "steps": config.steps, "blocks": totals["blocks"], "positions": totals["positions"]},
    )
    save_drafter(drafter, ctx.out / DRAFTER_FOLDER, target.dtype)
    ctx.summary(**totals, mined_steps=table.count(config.anchors))


STAGE = Stage(name="opd", config=OpdConfig, inputs=("target", "drafter", "trajectories", "steps"), run=run)
