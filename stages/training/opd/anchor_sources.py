"""Where OPD takes the anchors of a step from: the mined table, positions of the response, or what follows on them.

Every source gives `per_sequence` anchors a trajectory, so that kinds are compared at equal numbers of block positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.replay.chains import successors
from draftsmith.stages.runtime.ranks import Ranks
from draftsmith.stages.training.blocks import Anchors, View, drawn_positions, evenly, pad_anchors
from draftsmith.stages.training.opd.mined_table import Kind, draw_steps
from draftsmith.stages.training.opd.remining import Remining
from draftsmith.stages.training.opd.verify_steps import VerifySteps


@dataclass(frozen=True)
class Drawn:
    """The anchors of a step, and what is known of the verify steps there."""

    anchors: Anchors
    steps: VerifySteps | None  # None: judged on the blocks that the step drafts, so always current
    figures: dict[str, float] = field(default_factory=dict)
    judged: VerifySteps | None = None  # on these blocks, where the step had to know before it trains them
    unscored: Sequence[int] = ()  # rows of whose steps a loss wants to know what the target says


class AnchorSource(Protocol):
    """What it remembers between steps goes into the checkpoint, so that a resumed training draws the same."""

    numbers: int  # random ones that a row takes

    def draw(self, step: int, indices: Sequence[int], view: View, phases: np.ndarray) -> Drawn:
        """The anchors of the trajectories `indices`, which the view shows. phases: [B, numbers] in [0, 1), a row's own
        whoever draws it."""

    def share(self, ranks: Ranks) -> None:
        """Tell the others what was learnt of trajectories since the last call, and hear it from them."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TableAnchors:
    """Steps of the mined table, mined again when they are too old."""

    numbers = 1

    def __init__(self, remining: Remining, kind: Kind, per_sequence: int):
        self.remining, self.kind, self.per_sequence = remining, kind, per_sequence

    def draw(self, step: int, indices: Sequence[int], view: View, phases: np.ndarray) -> Drawn:
        figures = self.remining.refresh(step, indices, view)
        known = [self.remining.steps(i) for i in indices]  # each read once
        anchors, steps = draw_steps(known, self.kind, self.per_sequence, phases[:, 0], view.batch.tokens.device)
        return Drawn(anchors, steps, figures, unscored=self.remining.unscored(indices))

    def share(self, ranks: Ranks) -> None:
        self.remining.share(ranks)

    def state_dict(self) -> dict[str, Any]:
        return self.remining.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.remining.load_state_dict(state)


class Forgetful:
    """What sources share that remember nothing between steps."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def share(self, ranks: Ranks) -> None:
        pass


class RandomAnchors(Forgetful):
    """Positions of the response, whatever the drafter does there: the paper's ablation."""

    numbers = 1

    def __init__(self, per_sequence: int):
        self.per_sequence = per_sequence

    def draw(self, step: int, indices: Sequence[int], view: View, phases: np.ndarray) -> Drawn:  # noqa: ARG002
        chosen = drawn_positions(view.batch.trajectories, self.per_sequence, phases[:, 0])
        return Drawn(pad_anchors(chosen, view.batch.tokens.device), None)


class SuccessorAnchors(Forgetful):
    """Where verification goes on: one step of the current weights behind positions drawn from the whole response.

    What is trained is fresh at one block drafted for each that is trained, however long a trajectory is. A successor
    is on the trace or soon will be: a rejection sends it where it sends every chain that was rejected there.
    """

    numbers = 2

    def __init__(self, drafter: Drafter, proposals: int, per_sequence: int):
        """proposals: of a served block."""
        self.drafter, self.proposals, self.per_sequence = drafter, proposals, per_sequence

    def draw(self, step: int, indices: Sequence[int], view: View, phases: np.ndarray) -> Drawn:  # noqa: ARG002
        trajectories, device = view.batch.trajectories, view.batch.tokens.device
        before = np.stack(drawn_positions(trajectories, self.per_sequence, phases[:, 0]))
        behind = successors(
            self.drafter,
            view.context,
            trajectories,
            torch.from_numpy(before).to(device),
            self.proposals + 1,
            view.head,
            view.text,
        )
        # two positions may have the same successor: another one is trained twice then
        chosen = [
            evenly(np.unique(row), self.per_sequence, phase)
            for row, phase in zip(behind.cpu().numpy(), phases[:, 1], strict=True)
        ]
        return Drawn(pad_anchors(chosen, device), None)
