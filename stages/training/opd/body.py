"""Runs stage `opd`: loads answers and mined table, chooses the source of anchors, resolves the loss, trains."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from draftsmith.artifacts.tables.schemas import VERIFY_STEPS
from draftsmith.stages.data.trajectories import DRAFTER_FOLDER, Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint import lineage_from, load_drafter
from draftsmith.stages.runtime.ranks import Ranks
from draftsmith.stages.runtime.stage import StageContext
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.sampling import GREEDY
from draftsmith.stages.training.batches import step_rng
from draftsmith.stages.training.config import OpdConfig
from draftsmith.stages.training.loss_report import LossReport
from draftsmith.stages.training.opd.anchor_sources import (
    AnchorSource,
    ChainAnchors,
    RandomAnchors,
    SuccessorAnchors,
    TableAnchors,
)
from draftsmith.stages.training.opd.step import OpdStep, StepOptions
from draftsmith.stages.training.opd.verify_steps import STEP_COLUMNS, MinedTable, StepKind, load_mined
from draftsmith.stages.training.trainer import Trainer, TrainingData, load_answers, mapped_reader


def run(ctx: StageContext, config: OpdConfig) -> None:
    """Train the drafter further, on its own verify steps."""
    ranks = Ranks.current(config.parallel.target_parallel)
    stored = load_answers(ctx, ranks)
    target = Target.load(ctx.inputs["target"], ranks=ranks)
    folder = ctx.inputs["drafter"] / DRAFTER_FOLDER
    drafter = load_drafter(folder, target, torch.float32)
    table = _mined_table(ctx, config, stored.trajectories, drafter, ranks)
    data = MinedData(trajectories=stored.trajectories, sampling=stored.sampling, mined=table)
    training = OpdTraining(drafter, target, data, config, seed=ctx.seed, ranks=ranks)
    ctx.log(str(training))
    totals = training.train(ctx)
    if not ranks.is_main:
        return
    training.save(ctx, "opd", lineage_from(folder), totals)
    mined = {"mined_steps": int(table.counts(training.kind).sum())} if config.reads_table else {}
    ctx.summary(**totals, **mined, passes=training.passes)


def _mined_table(
    ctx: StageContext, config: OpdConfig, trajectories: Sequence[Trajectory], drafter: Drafter, ranks: Ranks
) -> MinedTable:
    """Return the mined table, with steps only if the anchors are mined steps.

    Without the input `mined`, the table's block size is the drafter's.
    """
    if not config.reads_table and "mined" not in ctx.inputs:
        return MinedTable.without_steps(drafter.block_size - 1)
    mined, reader = ctx.inputs["mined"], None
    if config.reads_table:  # every training step reads verify steps
        reader = mapped_reader(ctx, ranks, mined / "verify_steps.parquet", VERIFY_STEPS, STEP_COLUMNS)
    return load_mined(mined, trajectories, drafter.block_size, whole=config.reads_table, reader=reader)


@dataclass(frozen=True, kw_only=True)
class MinedData(TrainingData):
    """The answers that a drafter is trained on, with its mined verify steps."""

    mined: MinedTable  # of all answers where `OpdConfig.reads_table`


class OpdTraining(Trainer[OpdConfig, MinedData]):
    """Trains on blocks at the anchors that the drafter's own verification reaches."""

    memory: AnchorSource

    def _resolve(self) -> None:
        """Resolve loss, sampling and anchors. Raise DraftsmithError if no step of the config's kind was mined."""
        config, drafter, sampling = self.config, self.drafter, self.data.sampling
        self.mined = self.data.mined
        self.kind: StepKind = "errors" if config.anchors == "errors" else "visited"
        if config.reads_table:
            self.usable = self.mined.trajectories_with(self.kind)
        self.sampled = not sampling.greedy
        self._sampling = sampling if self.sampled and drafter.samples_proposals else GREEDY
        temperature = sampling.temperature if self._sampling.greedy else 1.0
        self.objective = config.loss.resolved(drafter.recipe, self.sampled, temperature)
        self.memory = anchor_source(config, self.mined, drafter, scored=self.objective.needs_scores)
        options = StepOptions(config, self.objective, self.mined.proposals, self._sampling)
        self._step = OpdStep(drafter, self.target, self.memory, options)
        reads = self.objective.response.loss != "cross_entropy" or drafter.has_confidence
        self.reads_target, self.scores_proposals = reads or not self._sampling.greedy, self.objective.needs_scores

    def micro_batches(self, step: int, limit: int | None) -> Iterator[LossReport]:
        return self._step.micro_batches(step, self.rank_slice(step, limit), step_rng(self.seed, step))

    def __str__(self) -> str:
        """Describe in one line what is trained."""
        config, response = self.config, self.objective.response
        beyond = f", weight exp(-d/{response.beyond:g}) at d after the correction" if response.beyond else ""
        return (
            f"verification {'sampled' if self.sampled else 'greedy'}: {response.loss} on {response.scope} offsets"
            f"{beyond}{', k3 on rejected ones' if self.objective.needs_scores else ''}; anchors {config.anchors}"
            f"{f' of {self.mined.counts(self.kind).sum()} mined steps' if config.reads_table else ''}; "
            f"{len(self.usable)} answers, {self.passes:.3g} passes over each"
            f"{f', mined again after {config.oldest_trace} steps' if config.oldest_trace else ''}"
        )


def anchor_source(config: OpdConfig, mined: MinedTable, drafter: Drafter, *, scored: bool) -> AnchorSource:
    """Return the source of anchors that a config asks for. scored: same as in `TableAnchors`."""
    count = config.anchors_per_sequence
    if config.anchors == "random":
        return RandomAnchors(count)
    if config.anchors == "chains":
        return ChainAnchors(count)
    if config.anchors == "successors":
        return SuccessorAnchors(drafter, mined.proposals, count)
    return TableAnchors(mined, drafter, config.anchors, count, every=config.oldest_trace, scored=scored)
