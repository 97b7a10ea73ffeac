"""SFT warm-start: train a drafter on the target's answers, from random weights or from an existing drafter.

Also the control of a refresh: with a drafter as input it continues SFT from there.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from draftsmith.stages.contract import Stage, StageContext
from draftsmith.stages.drafters.config import DFlashConfig, DrafterConfig
from draftsmith.stages.training.config import TrainingConfig
from draftsmith.stages.training.loss_config import DistributionLoss, PositionWeights, ResponseStream, TokenLoss

if TYPE_CHECKING:
    from draftsmith.stages.drafters.base import TrainingRecipe

_TRAINED = ("blocks", "positions")


class SftConfig(TrainingConfig):
    """A loss at every offset of blocks behind anchors anywhere in a response, weighted by exp(-(k-1)/γ) at offset k."""

    steps: Annotated[int, Field(ge=0, description="0: take the drafter of init_from as it is")] = 1000
    drafter: DrafterConfig = DFlashConfig()
    init_from: Annotated[
        str | None,
        Field(description="folder or hub id of a drafter in the layout that engines load; left out: random weights"),
    ] = None
    init_revision: Annotated[str | None, Field(description="commit, tag or branch of a hub id in init_from")] = None
    adopt: Annotated[
        bool, Field(description="take the drafter of init_from although it was made for another revision of the target")
    ] = False
    loss: Annotated[
        Literal["auto"] | TokenLoss | DistributionLoss,
        Field(
            description="auto is what the architecture's authors train with: cross_entropy on the committed token for "
            "DFlash, forward_kl to the target's distribution for EAGLE-3"
        ),
    ] = "auto"
    gamma: Annotated[
        float | None,
        Field(
            gt=0, description="left out, as the authors have it: 7 for DFlash (blocks of 16), 0.8 a step for EAGLE-3"
        ),
    ] = None

    @model_validator(mode="after")
    def _untrained_only_from_a_checkpoint(self) -> SftConfig:
        if self.steps == 0 and self.init_from is None:
            raise ValueError("steps: 0 takes a drafter as it is: name it in init_from, or train for at least one step")
        return self

    @model_validator(mode="after")
    def _about_a_checkpoint(self) -> SftConfig:
        for name in ("adopt", "init_revision"):
            if getattr(self, name) and self.init_from is None:
                raise ValueError(f"{name} is about the drafter of init_from: name it there, or leave {name} out")
        return self

    def stream(self, recipe: TrainingRecipe) -> ResponseStream:
        """What is trained, with the architecture's own recipe where fields are left open."""
        return ResponseStream(
            loss=recipe.loss if self.loss == "auto" else self.loss,  # type: ignore[arg-type]
            scope="block",
            positions=PositionWeights(kind="exponential", gamma=self.gamma or recipe.gamma),
        )

    def external_files(self) -> list[Path]:
        """The checkpoint that `init_from` names, if it is a folder."""
        folder = Path(self.init_from).expanduser() if self.init_from else None
        if folder is None or not folder.is_dir():
            return []
        return sorted(path.absolute() for path in folder.iterdir() if path.suffix in {".json", ".safetensors", ".npy"})


def preflight(config: SftConfig, target: Path) -> None:
    """A drafter to start from must fit the target, before anything long runs."""
    from draftsmith.stages.drafters.checkpoint import check_drafter, check_shape, drafter_source
    from draftsmith.stages.drafters.layout import check_weights
    from draftsmith.stages.targets.info import model_path, read_target_info

    if config.init_from:
        folder = drafter_source(config.init_from, config.init_revision)
        if not config.adopt:
            check_drafter(folder, read_target_info(target).digest)
        check_shape(folder, model_path(target))
        check_weights(folder)
    else:
        from draftsmith.stages.drafters.checkpoint import check_new

        check_new(config.drafter, model_path(target))


def trained_shape(config: SftConfig) -> tuple[str, int]:
    """Kind, and tokens of a block, the anchor included, of what is trained here from random weights or `init_from`."""
    from draftsmith.stages.drafters.checkpoint import architecture_of, drafter_source, kind_of

    if not config.init_from:
        return config.drafter.kind, config.drafter.block_size
    source = drafter_source(config.init_from, config.init_revision)
    architecture = architecture_of(source)
    return kind_of(architecture), int(architecture.read_config(source).block_size)


def unservable(config: SftConfig, target: Path) -> str | None:
    """Why SGLang could not draft with what is trained here from random weights or `init_from`; None if it can.

    target: a resolved target. Small files only.
    """
    from transformers import AutoConfig

    from draftsmith.stages.drafters.checkpoint import drafter_source, plan_of_checkpoint, plan_of_new
    from draftsmith.stages.drafters.layout import unservable_layers
    from draftsmith.stages.targets.info import model_path
    from draftsmith.stages.targets.resolve import load_tokenizer

    folder = model_path(target)
    target_config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if config.init_from:
        source = drafter_source(config.init_from, config.init_revision)
        plan = plan_of_checkpoint(source, target_config, config.init_from, lambda: load_tokenizer(folder))
    else:
        plan = plan_of_new(config.drafter, target_config, lambda: load_tokenizer(folder))
    return unservable_layers(plan.target_layer_ids, target_config.num_hidden_layers)


def run(ctx: StageContext, config: SftConfig) -> None:
    """Train, then write the checkpoint in the layout that engines load."""
    import torch

    from draftsmith.stages.drafters.base import DrafterInfo
    from draftsmith.stages.drafters.checkpoint import (
        create_drafter,
        descends_from,
        drafter_source,
        load_drafter,
        save_drafter,
    )
    from draftsmith.stages.stored import DRAFTER_FOLDER, load_trajectories
    from draftsmith.stages.targets.causal_lm import Target
    from draftsmith.stages.training.anchors import DRAWS, position_anchors
    from draftsmith.stages.training.batches import (
        FeatureSource,
        frequent_tokens,
        step_rng,
        token_counts,
        trajectories_of_step,
    )
    from draftsmith.stages.training.blocks import LossReport
    from draftsmith.stages.training.loop import train
    from draftsmith.stages.training.supervised import sft_loss
    from draftsmith.stages.training.vocabulary import HeadSource

    stored = load_trajectories(ctx.inputs["trajectories"])
    target = Target.load(ctx.inputs["target"])
    counts = token_counts(stored.trajectories, target.info.vocab_size)
    start = ctx.inputs["drafter"] / DRAFTER_FOLDER if "drafter" in ctx.inputs else None
    if start is None and config.init_from:
        start = drafter_source(config.init_from, config.init_revision)
    if start is not None:
        drafter = load_drafter(start, target, torch.float32, of_any_target=config.adopt)
    else:
        drafter = create_drafter(config.drafter, target, ctx.seed, frequent_tokens(counts))
    if drafter.frequent_tokens is None:
        drafter.frequent_tokens = frequent_tokens(counts).to(target.device)
    stream = config.stream(drafter.recipe)
    covered = drafter.head_over(target.head_weight, None).token_ids
    coverage = 1.0 if covered is None else float(counts[covered.cpu()].sum() / counts.sum())
    ctx.log(
        f"{stream.loss} at all offsets, weight exp(-(k-1)/{stream.weights().gamma:.3g}) at offset k; "
        f"{coverage:.2%} of the answers' tokens can be proposed; {len(stored.trajectories)} answers, drawn "
        f"{config.passes(len(stored.trajectories)):.3g} times each"
    )
    if drafter.has_own_head and config.head_tokens is not None:
        ctx.log("head_tokens is not read: this drafter has a head of its own (drafter.draft_vocab_size)")
    heads = HeadSource(drafter, target.head_weight, config)
    features = FeatureSource(
        target,
        drafter.target_layer_ids,
        stored.trajectories,
        tokens_per_group=config.tokens_per_target_forward,
        memory_mb=config.feature_memory_mb,
        with_hidden=stream.asks_target,
    )

    def loss_of_step(step: int) -> LossReport:
        rng = step_rng(ctx.seed, step)
        batch = features.batch(
            trajectories_of_step(len(stored.trajectories), config.sequences_per_step, step, ctx.seed)
        )
        draw = DRAWS[config.spacing]
        anchors = position_anchors(batch.trajectories, config.anchors_per_sequence, draw, rng, target.device)
        return sft_loss(
            drafter,
            batch,
            anchors,
            heads.draw(rng, [batch.tokens]),
            target.head_weight,
            stream,
            temperature=stored.temperature or 1.0,
            positions_per_chunk=config.positions_per_chunk,
        )

    totals = train(ctx, drafter, config, loss_of_step)
    drafter.info = DrafterInfo(
        target_digest=target.info.digest,
        target_source=target.info.source,
        parents=() if start is None else descends_from(start),
        training={"stage": "sft", "steps": config.steps, **{name: totals.get(name, 0) for name in _TRAINED}},
    )
    save_drafter(drafter, ctx.out / DRAFTER_FOLDER, target.dtype)
    ctx.summary(
        **totals,
        parameters=sum(p.numel() for p in drafter.parameters()),
        trajectories=len(stored.trajectories),
        passes=config.passes(len(stored.trajectories)),
        draft_vocabulary_coverage=coverage,
    )


STAGE = Stage(name="sft", config=SftConfig, inputs=("target", "trajectories", "drafter?"), run=run, preflight=preflight)
