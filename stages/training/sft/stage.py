"""SFT warm-start: train a drafter on the target's answers, from random weights or from an existing drafter.

Also the control of a refresh: with a drafter as input it continues SFT from there.
"""

from __future__ import annotations

from pathlib import Path

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.stages.runtime.stage import Compute, ParallelConfig, Stage, StageContext
from draftsmith.stages.training.config import SftConfig

_TRAINED = ("blocks", "positions")


def preflight(config: SftConfig, target: Path) -> None:
    """A drafter to start from must fit the target, before anything long runs."""
    from draftsmith.stages.drafters.checkpoint import check_drafter, check_new, check_shape, check_whole, drafter_source
    from draftsmith.stages.target.info import model_path, read_target_info

    check_start(config)
    if config.init_from:
        folder = drafter_source(config.init_from, config.init_revision)
        if not config.adopt:
            check_drafter(folder, read_target_info(target).digest)
        check_shape(folder, model_path(target))
        check_whole(folder)
    else:
        check_new(config.drafter, model_path(target))


def run(ctx: StageContext, config: SftConfig) -> None:
    """Train, then write the checkpoint in the layout that engines load. Without steps the drafter is taken as it is."""
    import torch

    from draftsmith.stages.data.load import DRAFTER_FOLDER, load_trajectories, splits_of
    from draftsmith.stages.drafters.base import DrafterInfo
    from draftsmith.stages.drafters.checkpoint import (
        create_drafter,
        descends_from,
        load_drafter,
        save_drafter,
        upgraded,
    )
    from draftsmith.stages.runtime.ranks import Ranks
    from draftsmith.stages.target.causal_lm import Target
    from draftsmith.stages.training.batches import frequent_tokens, token_counts
    from draftsmith.stages.training.estimate import micro_batch_tokens
    from draftsmith.stages.training.loop import MicroBatches, train
    from draftsmith.stages.training.sft.trainer import SftTraining

    ranks = Ranks.current(config.parallel.target_parallel)
    start = _start(ctx, config)
    stored = load_trajectories(ctx.inputs["trajectories"])
    target = Target.load(ctx.inputs["target"], ranks=ranks)
    counts = token_counts(stored.trajectories, target.info.vocab_size)
    if start is not None:
        drafter = load_drafter(start, target, torch.float32, of_any_target=config.adopt)
        drafter = upgraded(drafter, config.drafter, target, ctx.seed)
    else:
        drafter = create_drafter(config.drafter, target, ctx.seed, frequent_tokens(counts))
    known = drafter.frequent_tokens  # of the answers that it was trained on before; taken as it is, it keeps them
    if (known is None or config.steps) and "train" in splits_of(ctx.inputs["trajectories"]):  # never what measures
        before = None if known is None else known.cpu()
        drafter.frequent_tokens = frequent_tokens(counts, before).to(target.device)
    training = SftTraining(
        drafter,
        target,
        stored.trajectories,
        config,
        sampling=stored.sampling,
        seed=ctx.seed,
        ranks=ranks,
    )
    covered = drafter.head_over(target.head_weight, None).token_ids
    coverage = 1.0 if covered is None else float(counts[covered.cpu()].sum() / counts.sum())
    ctx.log(f"{training}; {coverage:.2%} of the answers' tokens can be proposed")
    if drafter.has_own_head and config.head_tokens is not None:
        ctx.log("head_tokens is not read: this drafter has a head of its own (drafter.draft_vocab_size)")
    longest = int(stored.trajectories.lengths.max())
    limit = micro_batch_tokens(config, target, drafter, longest)
    blocks = config.anchors_per_sequence * drafter.block_size  # tokens of a row beside its trajectory
    micro_batches = MicroBatches(training.micro_batches, limit, blocks, ctx.log, ctx.work)
    totals = train(ctx, drafter, config, micro_batches, ranks=ranks)
    if not ranks.is_main:
        return
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


def _start(ctx: StageContext, config: SftConfig) -> Path | None:
    """The checkpoint to go on from: the input, or that of `init_from`; None: random weights.

    Raises DraftsmithError for settings that are about a checkpoint where there is none.
    """
    from draftsmith.stages.data.load import DRAFTER_FOLDER
    from draftsmith.stages.drafters.checkpoint import drafter_source

    if "drafter" in ctx.inputs:
        return ctx.inputs["drafter"] / DRAFTER_FOLDER
    check_start(config)
    return drafter_source(config.init_from, config.init_revision) if config.init_from else None


def check_start(config: SftConfig) -> None:
    """Of a training without a drafter as an input. Raises DraftsmithError."""
    if config.init_from is None and config.steps == 0:
        raise DraftsmithError("steps: 0 takes a drafter as it is: name it in init_from")


STAGE = Stage(
    name="sft",
    config=SftConfig,
    inputs=("target", "trajectories", "drafter?"),
    body=__name__,
    preflight=preflight,
    compute=Compute.HEAVY,
    parallel=lambda config: config.parallel if config.steps else ParallelConfig(),
)
