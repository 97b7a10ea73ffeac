"""The mined table as OPD reads it: verify steps by trajectory, sampled as anchors of a batch."""

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
from draftsmith.artifacts.tables.parquet import pad_lists
from draftsmith.artifacts.tables.readers import KeyedRows, RowReader
from draftsmith.artifacts.tables.schemas import VERIFY_STEPS
from draftsmith.stages.data.trajectories import Trajectory, trajectory_ids
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.training.blocks import Anchors, pad_anchors, systematic_sample
from draftsmith.stages.training.opd.verify_steps import VerifySteps

StepKind = Literal["errors", "visited"]


@dataclass(frozen=True)
class TrajectorySteps:
    """The verify steps of one trajectory (S steps, K proposals of the trained block)."""

    anchors: np.ndarray  # [S]
    accepted: np.ndarray  # [S]
    committed: np.ndarray  # [S]
    rejected_offset: np.ndarray  # [S] 0 = nothing rejected
    proposed: np.ndarray  # [S, K]
    target_logprobs: np.ndarray  # [S, K] float32, NaN where not scored

    def of_kind(self, kind: StepKind) -> np.ndarray:
        """Return the indices of the steps that qualify as anchors."""
        return np.flatnonzero(self.rejected_offset > 0) if kind == "errors" else np.arange(len(self.anchors))


class StoredSteps(Sequence[TrajectorySteps]):
    """The steps of N trajectories, each read from their table when it is needed."""

    def __init__(self, rows: KeyedRows, errors: np.ndarray, proposals: int):
        """Read rows of VERIFY_STEPS. errors: [N] steps that rejected something. proposals: K of the trained block."""
        self.rows, self.errors, self.proposals = rows, errors, proposals

    def __len__(self) -> int:
        return len(self.errors)

    def __getitem__(self, index: int) -> TrajectorySteps:  # type: ignore[override]  # nobody takes a slice
        return _steps(self.rows.take([index], STEP_COLUMNS), self.proposals)


@dataclass(frozen=True)
class MinedTable:
    """Steps of every trajectory, in the order of the trajectories."""

    steps: Sequence[TrajectorySteps]
    proposals: int  # of a mined block: at most those of the trained block

    def counts(self, kind: StepKind) -> np.ndarray:
        """Count the steps of this kind of each trajectory [N]."""
        if isinstance(self.steps, StoredSteps):
            return self.steps.errors if kind == "errors" else self.steps.rows.counts
        return np.array([len(s.of_kind(kind)) for s in self.steps], dtype=np.int64)

    def count(self, kind: StepKind) -> int:
        """Count all steps of this kind."""
        return int(self.counts(kind).sum())

    def trajectories_with(self, kind: StepKind) -> list[int]:
        """Return the indices of the trajectories that have at least one such step."""
        indices: list[int] = np.flatnonzero(self.counts(kind)).tolist()
        if not indices:
            raise DraftsmithError(f"opd.anchors: no mined step is of kind {kind}. Train on kind visited or successors.")
        return indices


def sample_steps(
    steps: Sequence[TrajectorySteps], kind: StepKind, per_sequence: int, phases: np.ndarray, device: torch.device
) -> tuple[Anchors, VerifySteps]:
    """Sample `per_sequence` steps of each of B trajectories, at its phase in [0, 1) of `phases` [B].

    A trajectory that has no step of the kind any more gives any of its steps.
    """
    chosen = []
    for row, phase in zip(steps, phases, strict=True):
        candidates = row.of_kind(kind)
        chosen.append(systematic_sample(candidates if len(candidates) else row.of_kind("visited"), per_sequence, phase))

    def column(name: str) -> torch.Tensor:
        values = [getattr(row, name)[indices] for row, indices in zip(steps, chosen, strict=True)]
        return to_device(np.stack(values), device)

    anchors = pad_anchors([row.anchors[indices] for row, indices in zip(steps, chosen, strict=True)], device)
    names = ("accepted", "committed", "rejected_offset", "proposed", "target_logprobs")
    return anchors, VerifySteps(*(column(name) for name in names))


def load_mined(
    folder: Path,
    trajectories: Sequence[Trajectory],
    block_size: int,
    *,
    whole: bool = True,
    reader: RowReader | None = None,
) -> MinedTable:
    """Match verify_steps.parquet of a mining artifact to the trajectories that OPD trains on. The rows stay on disk.

    block_size: of the trained drafter. whole: whether every trajectory must be mined. reader: as of
    `load_trajectories`. Raises DraftsmithError if a trajectory must be mined and is not, or if the table's proposals
    are longer than the drafter's block.
    """
    path = folder / "verify_steps.parquet"
    reader, ids = reader or RowReader(path, VERIFY_STEPS), trajectory_ids(trajectories)
    rows = KeyedRows(reader, ids)
    if whole and not rows.counts.all():
        name = ids[int(rows.counts.argmin())].as_py()
        raise DraftsmithError(
            f"{path}: trajectory {name} was not mined. Mine all answers (`table: full` or `scored`), and leave out "
            "answers of one token."
        )
    errors, longest, row = np.zeros(len(ids), dtype=np.int64), 0, 0
    for group in reader.row_groups(["rejected_offset", "proposed_ids"]):
        rejecting = rows.key_index(row + np.flatnonzero(group["rejected_offset"].to_numpy()))
        errors += np.bincount(rejecting[rejecting >= 0], minlength=len(ids))
        longest = max(longest, pc.max(pc.list_value_length(group["proposed_ids"])).as_py())
        row += group.num_rows
    if longest > block_size - 1:
        raise DraftsmithError(
            f"{path}: mined with blocks of {longest + 1} tokens, more than the drafter's {block_size}. Mine again."
        )
    return MinedTable(StoredSteps(rows, errors, block_size - 1), longest)


def _steps(table: pa.Table, proposals: int) -> TrajectorySteps:
    """Convert one trajectory's rows; pad them to `proposals` if blocks were mined smaller than they are trained."""
    anchors, accepted, committed, rejected = (table[name].to_numpy().astype(np.int64) for name in _NUMBERS)
    return TrajectorySteps(
        anchors,
        accepted,
        committed,
        rejected,
        pad_lists(table, "proposed_ids", proposals, 0, np.int64),
        pad_lists(table, "target_logprobs", proposals, np.nan, np.float32),
    )


_NUMBERS = ("anchor", "accepted", "committed", "rejected_offset")
STEP_COLUMNS = (*_NUMBERS, "proposed_ids", "target_logprobs")
