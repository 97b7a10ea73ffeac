"""The world of OPD's tests, for any drafter: mined answers, and weights that have moved since."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.replay.scoring import score
from draftsmith.stages.replay.steps import Steps
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.training.batches import Batch, FeatureSource, step_rng
from draftsmith.stages.training.config import TrainingConfig
from draftsmith.stages.training.drafted_blocks import DraftingView, encode_batch
from draftsmith.stages.training.loss_registry import LossConfig
from draftsmith.stages.training.loss_report import LossReport
from draftsmith.stages.training.opd.anchor_sources import (
    AnchorSource,
    ChainAnchors,
    RandomAnchors,
    SuccessorAnchors,
    TableAnchors,
)
from draftsmith.stages.training.opd.step import OpdStep, StepOptions
from draftsmith.stages.training.opd.verify_steps import (
    MinedTable,
    StepAnchors,
    score_steps,
)
from tests.stages.bench import Bench
from tests.stages.training.case import mined_table, whole_step

COUNT, PER_SEQUENCE = 6, 5
INDICES = [4, 0, 3]  # of the trajectories in a batch
KINDS = ["errors", "visited", "successors", "chains", "random"]


@dataclass(frozen=True)
class World:
    """Greedy answers mined with the trained drafter, and a drafter whose weights have moved since."""

    bench: Bench
    moved: Drafter
    trajectories: list[Trajectory]
    table: MinedTable
    features: FeatureSource

    @property
    def target(self) -> Target:
        return self.bench.target

    @property
    def trained(self) -> Drafter:
        return self.bench.drafters["trained"]

    @property
    def batch(self) -> Batch:
        return self.features.batch(INDICES)

    def head_of(self, drafter: Drafter) -> Head:
        return drafter.head_over(self.target.head_weight, None)

    def traces(self, drafter: Drafter, block_size: int | None = None) -> list[Steps]:
        """Replay one block after the other."""
        return replace(self.bench, drafters={"it": drafter}).sequential_traces(self.trajectories, "it", block_size)

    def steps_gone(self) -> int:
        """Return how many of the mined steps of `INDICES` the moved weights do not have: anchor and accepted."""
        traces, gone = self.traces(self.moved), 0
        for i in INDICES:
            now = set(zip(traces[i].anchors.tolist(), traces[i].accepted.tolist(), strict=True))
            mined = self.table.steps_of(i)
            gone += sum(step not in now for step in zip(mined.anchors.tolist(), mined.accepted.tolist(), strict=True))
        return gone

    def mined_by(self, drafter: Drafter) -> MinedTable:
        traces = self.traces(drafter)
        return mined_table(score(self.target, self.trajectories, traces, 2048), drafter.block_size - 1)

    def scored(self, steps: Steps[torch.Tensor], proposals: int, tokens: int = 2048) -> Steps[torch.Tensor]:
        """Score steps at anchors of the batch. tokens: tokens that the target reads in one forward."""
        found = StepAnchors(steps.anchors, steps, unscored=range(len(INDICES)))
        return score_steps([(self.batch.trajectories, found)], self.target, proposals, tokens)[0].known_steps

    def view(self, indices: list[int] = INDICES, drafter: Drafter | None = None) -> DraftingView:
        batch, drafter = self.features.batch(indices), drafter or self.moved
        return DraftingView(batch, encode_batch(drafter, batch), self.head_of(drafter))

    def remining(self, every: int = 10, *, scored: bool = False, drafter: Drafter | None = None) -> TableAnchors:
        return TableAnchors(self.table, drafter or self.moved, "visited", PER_SEQUENCE, every=every, scored=scored)

    def source(
        self,
        kind: str,
        per_sequence: int = PER_SEQUENCE,
        remining: TableAnchors | None = None,
    ) -> AnchorSource:
        """Return a source. remining: for a kind that reads the table; None: mined steps, never mined again."""
        if kind == "successors":
            return SuccessorAnchors(self.moved, self.table.proposals, per_sequence)
        if kind == "chains":
            return ChainAnchors(per_sequence)
        if kind == "random":
            return RandomAnchors(per_sequence)
        remining = remining or self.remining(every=0, scored=True)
        remining.kind, remining.per_sequence = "errors" if kind == "errors" else "visited", per_sequence
        return remining

    def objective(self, value: Any) -> LossConfig:
        """Resolve a loss for greedy verification."""
        return LossConfig.model_validate(value).resolved(self.moved.recipe, False, 0.0)

    def step(
        self,
        source: AnchorSource,
        objective: LossConfig,
        *,
        proposals: int | None = None,
        per_sequence: int = PER_SEQUENCE,
    ) -> OpdStep:
        """Return steps of the moved drafter. proposals: length of a served block; None: of the trained one."""
        config = TrainingConfig(sequences_per_step=len(INDICES), anchors_per_sequence=per_sequence)
        options = StepOptions(config, objective, proposals or self.table.proposals)
        return OpdStep(self.moved, self.target, source, options)


def make_world(bench: Bench, moved_by: float) -> World:
    """Make a world without near-ties, in which some of the mined steps of `INDICES` are none of the moved weights.

    moved_by: noise on the weights, as a share of each parameter's deviation. It is doubled until it has that effect:
    how much is enough depends on the weights.
    """
    while True:
        world = _moved_world(bench, moved_by)
        if world.steps_gone():
            return world
        moved_by *= 2


def _moved_world(bench: Bench, moved_by: float) -> World:
    moved = copy.deepcopy(bench.drafters["trained"])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(moved_by * parameter.std() * torch.randn(parameter.shape, generator=generator))
    trajectories = bench.clear(bench.answered(), moved)[:COUNT]
    features = FeatureSource(bench.target, moved.target_layer_ids, trajectories, TrainingConfig())
    unmined = World(bench, moved, trajectories, mined_table([], moved.block_size - 1), features)
    return replace(unmined, table=unmined.mined_by(unmined.trained))


def loss_of(step: OpdStep, batch: Batch) -> LossReport:
    """Return the loss of step 5 on the trajectories `INDICES`, as one batch."""
    (report,) = step.micro_batches(5, whole_step(INDICES, batch), step_rng(0, 5))
    return report


def shifts(step: int, numbers: int) -> np.ndarray:
    """Return the shifts [B, numbers] of the rows of `INDICES`, as a step samples them."""
    return step_rng(0, step).random((len(INDICES), numbers))


def without_errors(table: MinedTable, index: int) -> MinedTable:
    """Return one trajectory of a table, as if nothing had been rejected there."""
    steps = table.steps_of(index)
    return mined_table([replace(steps, accepted=steps.judged)], table.proposals)
