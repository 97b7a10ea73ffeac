"""OPD: on-policy distillation of the target's feedback on the blocks that the drafter's own verification leads to.

After Draft-OPD, arXiv 2605.29343: draft from positions where verification goes on (mined, or found under the current
weights), with gradient, and learn from what the target said about accepted and rejected proposals.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from draftsmith.stages.contract import Stage, StageContext
from draftsmith.stages.training.config import TrainingConfig
from draftsmith.stages.training.loss_config import LossConfig

if TYPE_CHECKING:
    from draftsmith.stages.training.on_policy.remining import Remining
    from draftsmith.stages.training.on_policy.sources import AnchorSource


class OpdConfig(TrainingConfig):
    """What is distilled, and where."""

    steps: Annotated[int, Field(ge=1)] = 400
    learning_rate: Annotated[float, Field(gt=0)] = 3e-4
    verification: Annotated[
        Literal["auto", "greedy", "sampled"],
        Field(
            description="the rule that the drafter will serve under, which decides the loss where that is left open; "
            "auto: as the trajectories were drawn"
        ),
    ] = "auto"
    loss: Annotated[
        LossConfig,
        Field(
            description="matched: what fits the verification rule and the architecture; paper: Bernoulli forward KL on "
            "what verification committed plus k3 reverse KL on the rejected suffix; or the streams in full"
        ),
    ] = LossConfig()
    anchors: Annotated[
        Literal["errors", "visited", "successors", "random", "rolling"],
        Field(
            description="mined verify steps that rejected something, all that were visited, successors (where a verify "
            "step of the current weights leads from positions all over the response), positions whatever the drafter "
            "does there, or chains that start on the mined trace and roll on: each anchor the successor of the one "
            "trained before"
        ),
    ] = "successors"
    trajectories: Annotated[
        Literal["equal", "errors"],
        Field(
            description="how often each is trained on: all equally, or in proportion to the error positions that were "
            "last mined in it"
        ),
    ] = "equal"
    remine_every: Annotated[
        int | None,
        Field(
            ge=0,
            description="mine a trajectory again, with the current weights, when a batch draws it and its trace is so "
            "many steps old; 0: train on the trace as it was mined; left out: 1 where anchors are read off a trace",
        ),
    ] = None

    @model_validator(mode="after")
    def _remines_a_trace(self) -> OpdConfig:
        if self.remine_every and self.anchors not in ("errors", "visited"):
            raise ValueError(
                f"remine_every: anchors {self.anchors!r} are judged with the current weights anyway: set it to 0, or "
                "train on 'errors' or 'visited'"
            )
        return self

    @property
    def oldest_trace(self) -> int:
        """`remine_every` where it was left open too; 0: no trace is mined again."""
        if self.remine_every is not None:
            return self.remine_every
        return 1 if self.anchors in ("errors", "visited") else 0


def run(ctx: StageContext, config: OpdConfig) -> None:
    """Continue training the drafter that was mined, on its own steps."""
    import torch

    from draftsmith.stages.drafters.base import DrafterInfo
    from draftsmith.stages.drafters.checkpoint import descends_from, load_drafter, save_drafter
    from draftsmith.stages.stored import DRAFTER_FOLDER, load_trajectories
    from draftsmith.stages.targets.causal_lm import Target
    from draftsmith.stages.training.batches import FeatureSource, step_rng, trajectories_by_errors, trajectories_of_step
    from draftsmith.stages.training.blocks import LossReport
    from draftsmith.stages.training.loop import train
    from draftsmith.stages.training.on_policy.mined import Kind, load_mined
    from draftsmith.stages.training.on_policy.remining import Remining
    from draftsmith.stages.training.on_policy.step import OpdStep

    stored = load_trajectories(ctx.inputs["trajectories"])
    target = Target.load(ctx.inputs["target"])
    folder = ctx.inputs["drafter"] / DRAFTER_FOLDER
    drafter = load_drafter(folder, target, torch.float32)
    table = load_mined(ctx.inputs["steps"], stored.trajectories, drafter.block_size)
    kind: Kind = "errors" if config.anchors == "errors" else "visited"
    usable = table.trajectories_with(kind)
    sampled = config.verification == "sampled" or (config.verification == "auto" and stored.temperature > 0)
    objective = config.loss.resolved(drafter.recipe, sampled, stored.temperature)
    remining = Remining(
        table,
        drafter,
        target,
        every=config.oldest_trace,
        scored=objective.needs_scores,
        tokens_per_forward=config.tokens_per_target_forward,
    )
    source = anchor_source(config, remining)
    beyond = objective.response.beyond
    ctx.log(
        f"verification {'sampled' if sampled else 'greedy'}: {objective.response.loss} on {objective.response.scope} "
        f"offsets{f', weight exp(-d/{beyond:g}) at d behind the correction' if beyond else ''}"
        f"{', k3 on rejected ones' if objective.needs_scores else ''}; anchors {config.anchors}: "
        f"{table.count(kind)} mined steps in {len(usable)} trajectories, drawn "
        f"{config.passes(len(usable)):.3g} times each on average"
        f"{f', mined again after {config.oldest_trace} steps' if config.oldest_trace else ''}"
    )
    features = FeatureSource(
        target,
        drafter.target_layer_ids,
        stored.trajectories,
        tokens_per_group=config.tokens_per_target_forward,
        memory_mb=config.feature_memory_mb,
        with_hidden=objective.response.asks_target,
    )
    opd = OpdStep(drafter, target, source, objective, config, table.proposals)

    def loss_of_step(step: int) -> LossReport:
        if config.trajectories == "errors":
            errors = remining.current.errors(usable)
            places = trajectories_by_errors(errors, config.sequences_per_step, step, ctx.seed)
        else:
            places = trajectories_of_step(len(usable), config.sequences_per_step, step, ctx.seed)
        chosen = [usable[i] for i in places]
        return opd.loss(step, chosen, features.batch(chosen), step_rng(ctx.seed, step))

    totals = train(ctx, drafter, config, loss_of_step, source)
    drafter.info = DrafterInfo(
        target_digest=target.info.digest,
        target_source=target.info.source,
        parents=descends_from(folder),
        training={"stage": "opd", "steps": config.steps, "blocks": totals["blocks"], "positions": totals["positions"]},
    )
    save_drafter(drafter, ctx.out / DRAFTER_FOLDER, target.dtype)
    ctx.summary(**totals, mined_steps=table.count(kind), passes=config.passes(len(usable)))


def anchor_source(config: OpdConfig, remining: Remining) -> AnchorSource:
    """The source of anchors that a config asks for."""
    from draftsmith.stages.training.anchors import DRAWS
    from draftsmith.stages.training.on_policy.sources import (
        RandomAnchors,
        RollingAnchors,
        SuccessorAnchors,
        TableAnchors,
    )

    count, draw = config.anchors_per_sequence, DRAWS[config.spacing]
    if config.anchors == "random":
        return RandomAnchors(count, draw)
    if config.anchors == "successors":
        return SuccessorAnchors(remining.mined, remining.drafter, count, draw)
    if config.anchors == "rolling":
        return RollingAnchors(remining.mined, count, draw)
    return TableAnchors(remining, config.anchors, count, draw)


STAGE = Stage(name="opd", config=OpdConfig, inputs=("target", "drafter", "trajectories", "steps"), run=run)
