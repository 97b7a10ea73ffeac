"""Verify steps as rows of TRACE and VERIFY_STEPS, and back."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from draftsmith.artifacts.tables.parquet import pad_lists, to_table
from draftsmith.artifacts.tables.schemas import VERIFY_STEPS, TableSchema
from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.replay.steps import NO_TOKEN, Steps


def steps_table(schema: TableSchema, answers: Iterable[tuple[Trajectory, Steps]]) -> pa.Table:
    """Return the steps of answers as rows of TRACE or, if scored, of VERIFY_STEPS."""
    parts = [_columns(*answer, schema) for answer in answers]
    return to_table(schema, pa.concat_tables(parts) if parts else schema.columns.empty_table())


def _columns(trajectory: Trajectory, steps: Steps, schema: TableSchema) -> pa.Table:
    known = steps.proposed != NO_TOKEN
    columns = {
        "trajectory_id": pa.repeat(trajectory.trajectory_id, len(steps)),
        "step": np.arange(len(steps)),
        "anchor": steps.anchors,
        "accepted": steps.accepted,
        "proposed_ids": _lists(steps.proposed, known, pa.int32()),
        "target_logprobs": pa.nulls(len(steps), pa.list_(pa.float32())),
    }
    if steps.target_logprobs is not None:
        columns["target_logprobs"] = _lists(steps.target_logprobs, known, pa.float32())
    if schema is VERIFY_STEPS:
        tokens = np.array(trajectory.tokens)
        following = np.minimum(steps.anchors + steps.accepted + 1, len(tokens) - 1)
        columns |= {
            "committed": steps.committed,
            "rejected_offset": steps.rejected_offset,
            "judged": steps.judged,
            "committed_id": np.where(steps.committed > steps.accepted, tokens[following], -1),
            "best_logprob": steps.best_logprob,
        }
    return pa.table(columns)


def _lists(values: np.ndarray, known: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Return [rows] lists: the known part of each row of `values` [rows, width]."""
    offsets = np.append(0, known.sum(1).cumsum()).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values[known]).cast(kind))


STORED = ("anchor", "accepted", "proposed_ids", "target_logprobs")  # columns that `stored_steps` reads


def stored_steps(table: pa.Table, length: int, proposals: int) -> Steps:
    """Return the steps of one trajectory from its rows of VERIFY_STEPS. length: its tokens. proposals: per block."""
    anchors, accepted = (table[name].to_numpy().astype(np.int64) for name in ("anchor", "accepted"))
    proposed = pad_lists(table, "proposed_ids", proposals, 0, np.int64)
    logprobs = pad_lists(table, "target_logprobs", proposals, np.nan, np.float32)
    return Steps(length, anchors, accepted, proposed, logprobs)
