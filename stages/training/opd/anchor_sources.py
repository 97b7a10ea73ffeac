"""Where OPD takes a step's anchors from: the mined table, positions of the answer, or what follows them.

Every source gives `per_sequence` anchors a trajectory, so that kinds are compared at equal numbers of block positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from draftsmith.stages.drafters.base import Drafter, PreparedDrafter
from draftsmith.stages.replay.chains import successors
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.runtime.ranks import Ranks
from draftsmith.stages.training.blocks import (
    Anchors,
    DraftingView,
    pad_anchors,
    position_anchors,
    sample_positions,
    systematic_sample,
)
from draftsmith.stages.training.loop import Resumable, StateDict
from draftsmith.stages.training.opd.mined_table import StepKind, sample_steps
from draftsmith.stages.training.opd.remining import Remining
from draftsmith.stages.training.opd.verify_steps import VerifySteps


@dataclass(frozen=True)
class StepAnchors:
    """The anchors of a step, and what is known of the verify steps there."""

    anchors: Anchors
    steps: VerifySteps | None  # of the source; None: they are found on the blocks that the step drafts
    metrics: dict[str, float] = field(default_factory=dict)
    verified: VerifySteps | None = None  # found on these blocks, if the step needs them before it trains the blocks
    unscored: Sequence[int] = ()  # rows of steps that the target has yet to score for a loss

    @property
    def known_steps(self) -> VerifySteps | None:
        """Return the verify steps, wherever they come from; None if nobody knows them yet."""
        return self.steps or self.verified


class AnchorSource(Resumable, Protocol):
    """A source of anchors. What it remembers goes into the checkpoint: a resumed training has the same anchors."""

    numbers: int  # random numbers that a row takes

    def sample(self, step: int, indices: Sequence[int], view: DraftingView, phases: np.ndarray) -> StepAnchors:
        """Return the anchors of the trajectories `indices`, which the view shows.

        phases: [B, numbers] in [0, 1); a row has the same ones on any rank.
        """

    def share(self, ranks: Ranks) -> None:
        """Exchange with the other ranks what was learnt of trajectories since the last call."""


class TableAnchors:
    """Steps of the mined table, mined again when they are too old."""

    numbers = 1

    def __init__(self, remining: Remining, kind: StepKind, per_sequence: int):
        self.remining, self.kind, self.per_sequence = remining, kind, per_sequence

    def sample(self, step: int, indices: Sequence[int], view: DraftingView, phases: np.ndarray) -> StepAnchors:
        metrics = self.remining.refresh(step, indices, view)
        known = [self.remining.steps(i) for i in indices]  # each read once
        anchors, steps = sample_steps(known, self.kind, self.per_sequence, phases[:, 0], view.batch.tokens.device)
        return StepAnchors(anchors, steps, metrics, unscored=self.remining.unscored(indices))

    def share(self, ranks: Ranks) -> None:
        self.remining.share(ranks)

    def state_dict(self) -> StateDict:
        return self.remining.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        self.remining.load_state_dict(state)


class StatelessSource:
    """The base of sources that remember nothing between steps."""

    def state_dict(self) -> StateDict:
        return {}

    def load_state_dict(self, state: StateDict) -> None:
        pass

    def share(self, ranks: Ranks) -> None:
        pass


class RandomAnchors(StatelessSource):
    """Positions of the answer, whatever the drafter does there: the paper's ablation."""

    numbers = 1

    def __init__(self, per_sequence: int):
        self.per_sequence = per_sequence

    def sample(self, step: int, indices: Sequence[int], view: DraftingView, phases: np.ndarray) -> StepAnchors:  # noqa: ARG002
        batch = view.batch
        return StepAnchors(
            position_anchors(batch.trajectories, self.per_sequence, phases[:, 0], batch.tokens.device), None
        )


class SuccessorAnchors(StatelessSource):
    """Where verification continues: one step of the current weights after positions sampled from the whole answer.

    Training on fresh steps then costs one drafted block for each trained one, however long a trajectory is. A successor
    is on the trace or soon will be: a rejection leads where it leads every chain that was rejected there.
    """

    numbers = 2

    def __init__(self, drafter: Drafter, proposals: int, per_sequence: int):
        """Take positions of `per_sequence` blocks. proposals: of a served block."""
        self.drafter, self.proposals, self.per_sequence = drafter, proposals, per_sequence

    def sample(self, step: int, indices: Sequence[int], view: DraftingView, phases: np.ndarray) -> StepAnchors:  # noqa: ARG002
        trajectories, device = view.batch.trajectories, view.batch.tokens.device
        positions = np.stack(sample_positions(trajectories, self.per_sequence, phases[:, 0]))
        following = successors(
            PreparedDrafter(self.drafter, view.head, self.proposals + 1),
            view.context,
            trajectories,
            to_device(positions, device),
            view.sampler,
        )
        # two positions may have the same successor: another one is trained twice then
        chosen = [
            systematic_sample(np.unique(row), self.per_sequence, phase)
            for row, phase in zip(following.cpu().numpy(), phases[:, 1], strict=True)
        ]
        return StepAnchors(pad_anchors(chosen, device), None)
