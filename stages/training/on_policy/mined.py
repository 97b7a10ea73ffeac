"""The mined table as OPD reads it: verify steps by trajectory, drawn as anchors of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from draftsmith.artifacts.errors import DraftsmithError
from draftsmith.artifacts.parquet import ordered, padded, places, read_table
from draftsmith.artifacts.schemas import VERIFY_STEPS
from draftsmith.stages.replay.trace import Trajectory
from draftsmith.stages.training.anchors import draw_evenly, pad_anchors
from draftsmith.stages.training.blocks import Anchors
from draftsmith.stages.training.on_policy.verify_steps import VerifySteps

Kind = Literal["errors", "visited"]


@dataclass(frozen=True)
class TrajectorySteps:
    """The verify steps of one trajectory (S steps, K proposals of the trained block)."""

    anchors: np.ndarray  # [S]
    accepted: np.ndarray  # [S]
    committed: np.ndarray  # [S]
    rejected_offset: np.ndarray  # [S] 0 = nothing rejected
    proposed: np.ndarray  # [S, K]
    target_logprobs: np.ndarray  # [S, K] float32, NaN where not judged or not scored

    def of_kind(self, kind: Kind) -> np.ndarray:
        """Indices of the steps that qualify as anchors."""
        return np.flatnonzero(self.rejected_offset > 0) if kind == "errors" else np.arange(len(self.anchors))


@dataclass(frozen=True)
class MinedTable:
    """Steps of every trajectory, in the order of the trajectories."""

    steps: list[TrajectorySteps]
    proposals: int  # of a mined block: at most those of the trained block

    def count(self, kind: Kind) -> int:
        return sum(len(s.of_kind(kind)) for s in self.steps)

    def trajectories_with(self, kind: Kind) -> list[int]:
        """Indices of the trajectories that have at least one such step."""
        found = [i for i, s in enumerate(self.steps) if len(s.of_kind(kind))]
        if not found:
            raise DraftsmithError(f"opd.anchors: no mined step is of kind {kind!r}; the drafter made no error there")
        return found

    def draw(
        self,
        indices: Sequence[int],
        kind: Kind,
        per_sequence: int,
        rng: np.random.Generator,
        device: torch.device,
    ) -> tuple[Anchors, VerifySteps]:
        """`per_sequence` steps of each trajectory. One that has none of the kind any more lends all that it has."""
        chosen = []
        for i in indices:
            candidates = self.steps[i].of_kind(kind)
            chosen.append(
                draw_evenly(candidates if len(candidates) else self.steps[i].of_kind("visited"), per_sequence, rng)
            )

        def column(name: str) -> torch.Tensor:
            values = [getattr(self.steps[i], name)[picked] for i, picked in zip(indices, chosen, strict=True)]
            return torch.from_numpy(np.stack(values)).to(device)

        anchors = pad_anchors(
            [self.steps[i].anchors[picked] for i, picked in zip(indices, chosen, strict=True)], device
        )
        names = ("accepted", "committed", "rejected_offset", "proposed", "target_logprobs")
        return anchors, VerifySteps(*(column(name) for name in names))


def load_mined(folder: Path, trajectories: Sequence[Trajectory], block_size: int) -> MinedTable:
    """verify_steps.parquet of a mining artifact, matched to the trajectories that OPD trains on.

    Raises DraftsmithError as `match_steps` does.
    """
    path = folder / "verify_steps.parquet"
    return match_steps(read_table(path, VERIFY_STEPS, _COLUMNS), trajectories, block_size, str(path))


def match_steps(
    table: pa.Table, trajectories: Sequence[Trajectory], block_size: int, where: str = "mined steps"
) -> MinedTable:
    """VERIFY_STEPS by trajectory, in the order of the trajectories. block_size: of the drafter that is trained.

    Raises DraftsmithError if a trajectory was not mined, or the table's proposals are longer than the drafter's block.
    """
    wanted = [trajectory.trajectory_id for trajectory in trajectories]
    table = ordered(table, "trajectory_id", wanted)
    place = places(table, "trajectory_id", wanted)
    bounds = np.searchsorted(place, np.arange(len(wanted) + 1))
    for trajectory, count in zip(wanted, np.diff(bounds).tolist(), strict=True):
        if count == 0:
            raise DraftsmithError(f"{where}: trajectory {trajectory} was not mined; rerun stage 'mining'")
    K = block_size - 1
    longest = int(pc.max(pc.list_value_length(table["proposed_ids"])).as_py())
    if longest > K:
        raise DraftsmithError(
            f"{where}: blocks of {longest + 1} tokens, the drafter was trained on {block_size}; mine again"
        )
    numbers = [
        table[name].to_numpy().astype(np.int64) for name in ("anchor", "accepted", "committed", "rejected_offset")
    ]
    # a smaller mined block is padded to the trained one
    proposed = padded(table, "proposed_ids", K, 0, np.int64)
    logprobs = padded(table, "target_logprobs", K, np.nan, np.float32)
    of_all = zip(*(np.split(column, bounds[1:-1]) for column in (*numbers, proposed, logprobs)), strict=True)
    return MinedTable([TrajectorySteps(*columns) for columns in of_all], longest)


_COLUMNS = [
    "trajectory_id", "anchor", "accepted", "committed", "rejected_offset", "proposed_ids", "target_logprobs",
]  # fmt: skip
