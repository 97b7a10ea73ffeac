"""Writes mined steps as a table, a row per verify step, and summarises them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from draftsmith.artifacts.tables.parquet import pad_lists, select_in_order, to_table
from draftsmith.artifacts.tables.schemas import VERIFY_STEPS
from draftsmith.stages.data.trajectories import Trajectory, trajectory_ids
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.replay.options import ReplayOptions
from draftsmith.stages.replay.replayer import MinedGroup, Replayer
from draftsmith.stages.replay.scoring import StepScores
from draftsmith.stages.replay.trace import Trace
from draftsmith.stages.runtime.stage import JsonObject
from draftsmith.stages.target.causal_lm import Target


def mined_table(
    target: Target, drafter: Drafter, trajectories: Sequence[Trajectory], options: ReplayOptions | None = None
) -> pa.Table:
    """Mine trajectories in memory, and return their VERIFY_STEPS in the same order, with all proposals scored."""
    tables = [steps_table(group) for group in Replayer(target, options).mine(drafter, trajectories)]
    return to_table(
        VERIFY_STEPS, select_in_order(pa.concat_tables(tables), "trajectory_id", trajectory_ids(trajectories))
    )


def steps_table(group: MinedGroup) -> pa.Table:
    """Return the rows of VERIFY_STEPS of a mined group."""
    members = zip(group.trajectories, group.traces, group.scores, strict=True)
    return pa.concat_tables([_steps(*member) for member in members])


def _steps(trajectory: Trajectory, trace: Trace, scores: StepScores) -> pa.Table:
    tokens = np.array(trajectory.tokens)
    following = np.minimum(trace.anchors + trace.accepted + 1, len(tokens) - 1)
    columns = {
        "trajectory_id": pa.repeat(trajectory.trajectory_id, len(trace.anchors)),
        "step": np.arange(len(trace.anchors)),
        "anchor": trace.anchors,
        "accepted": trace.accepted,
        "committed": trace.committed,
        "rejected_offset": trace.rejected_offset,
        "judged": trace.judged,
        "proposed_ids": _lists(trace.proposed, pa.int32()),
        "target_logprobs": _lists(scores.target_logprobs, pa.float32()),
        "committed_id": np.where(trace.committed > trace.accepted, tokens[following], -1),
        "best_logprob": scores.best_logprob,
    }
    return to_table(VERIFY_STEPS, pa.table(columns))


def _lists(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return [rows] lists: the rows of `values` [rows, width]."""
    rows, width = values.shape
    offsets = (np.arange(rows + 1) * width).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values.reshape(-1)).cast(kind))


CERTAIN = 0.9  # the target's probability of its best token


class MiningMetrics:
    """Sums up verify steps from rows of VERIFY_STEPS, however they are divided. Sums are divided once, at the end."""

    def __init__(self, block_size: int):
        self.block_size = block_size
        self.steps = self._committed = self._errors = self._certain = 0
        self._verified, self._accepted_at = np.zeros((2, block_size - 1), dtype=np.int64)  # by offset
        self._accepted = np.zeros(block_size, dtype=np.int64)
        self._rejected, self._corrections = HeavyHitters(), HeavyHitters()

    def add(self, table: pa.Table) -> None:
        """Add some rows."""
        K = self.block_size - 1
        accepted = table["accepted"].to_numpy()
        verified = np.arange(K) < table["judged"].to_numpy()[:, None]
        wrong = np.flatnonzero(table["rejected_offset"].to_numpy())
        proposed = pad_lists(table, "proposed_ids", K, -1, np.int64)[
            wrong, accepted[wrong]
        ]  # the first after the accepted ones
        self.steps += table.num_rows
        self._committed += int(table["committed"].to_numpy().sum())
        self._errors += len(wrong)
        self._certain += int((np.exp(table["best_logprob"].to_numpy()[wrong]) >= CERTAIN).sum())
        self._verified += verified.sum(0)
        self._accepted_at += (verified & (np.arange(K) < accepted[:, None])).sum(0)
        self._accepted += np.bincount(accepted, minlength=K + 1)
        self._rejected.add(proposed)
        self._corrections.add(proposed << 32 | table["committed_id"].to_numpy()[wrong].astype(np.int64))

    def summary(self, tokenizer: Any) -> JsonObject:
        """Return the content of summary.json of stage `mining`, to which the stage adds the last fields."""
        rejected, corrections = self._rejected.most_common(20), self._corrections.most_common(20)
        return {
            "definition_of_tau": "committed tokens per verify step, the target's own token included (+1)",
            "tau": self._committed / self.steps,
            "steps": self.steps,
            "error_positions": self._errors,
            "certain_errors": {
                "at_least": CERTAIN,
                "share": self._certain / self._errors if self._errors else None,
            },
            "block_size": self.block_size,
            "acceptance_by_offset": [
                accepted / verified if verified else None
                for accepted, verified in zip(self._accepted_at.tolist(), self._verified.tolist(), strict=True)
            ],
            "accepted_histogram": self._accepted.tolist(),
            "counts_short_by_at_most": max(self._rejected.short, self._corrections.short),
            "most_rejected": [
                {"token": tokenizer.decode([token]), "id": token, "count": count} for token, count in rejected
            ],
            "most_frequent_corrections": [
                {
                    "proposed": tokenizer.decode([pair >> 32]),
                    "committed": tokenizer.decode([pair & 0xFFFFFFFF]),
                    "count": count,
                }
                for pair, count in corrections
            ],
        }


class HeavyHitters:
    """Counts how often values occur. Of more than `most` different ones the least frequent are forgotten.

    This is lossy counting: a count is too low by at most `short`, which is 0 as long as nothing was forgotten.
    """

    def __init__(self, most: int = 1 << 21):
        self._most, self.short = most, 0
        self._values = self._counts = self._first = np.zeros(0, dtype=np.int64)
        self._waiting: list[np.ndarray] = []
        self._seen = self._counted = 0

    def add(self, values: np.ndarray) -> None:
        """Count values [n] int64."""
        self._waiting.append(values)
        self._seen += len(values)
        if self._seen - self._counted >= self._most:
            self._count()

    def most_common(self, count: int) -> list[tuple[int, int]]:
        """Return values and their counts, most frequent first; of equal counts, the value that occurred first."""
        self._count()
        order = np.lexsort([self._first, -self._counts])[:count]
        return list(zip(self._values[order].tolist(), self._counts[order].tolist(), strict=True))

    def _count(self) -> None:
        if not self._waiting:
            return
        values, first, counts = np.unique(np.concatenate(self._waiting), return_index=True, return_counts=True)
        self._values, index, inverse = np.unique(
            np.concatenate([self._values, values]), return_index=True, return_inverse=True
        )
        self._first = np.concatenate([self._first, first + self._counted])[index]  # earlier values come first
        self._counts = np.bincount(inverse, np.concatenate([self._counts, counts])).astype(np.int64)
        self._waiting, self._counted = [], self._seen
        floor = 1
        while len(self._values) > self._most:
            frequent = self._counts > floor
            self._values, self._counts = self._values[frequent], self._counts[frequent]
            self._first = self._first[frequent]
            self.short, floor = self.short + floor, 2 * floor
