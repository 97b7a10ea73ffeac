"""Mined steps as a table: a row a verify step, and the figures of all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from draftsmith.artifacts.parquet import padded, to_table
from draftsmith.artifacts.schemas import VERIFY_STEPS
from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.replay.corpus import Mined, mine
from draftsmith.stages.replay.scoring import StepScores
from draftsmith.stages.replay.trace import Trace, Trajectory
from draftsmith.stages.targets.causal_lm import Target


def mined_table(target: Target, drafter: Drafter, trajectories: Sequence[Trajectory], **settings: Any) -> pa.Table:
    """VERIFY_STEPS of a drafter on trajectories in memory, in their order. settings: as of `mine`."""
    found = {}
    for group in mine(target, drafter, trajectories, **settings):
        for trajectory, trace, scores in zip(group.trajectories, group.traces, group.scores, strict=True):
            found[trajectory.trajectory_id] = rows_of(trajectory, trace, scores)
    return to_table(VERIFY_STEPS, [row for t in trajectories for row in found[t.trajectory_id]])


def rows_of_group(group: Mined) -> list[dict[str, Any]]:
    """The rows of VERIFY_STEPS of a mined group."""
    members = zip(group.trajectories, group.traces, group.scores, strict=True)
    return [row for member in members for row in rows_of(*member)]


def rows_of(trajectory: Trajectory, trace: Trace, scores: StepScores) -> list[dict[str, Any]]:
    """The rows of VERIFY_STEPS of one trajectory."""
    rows = []
    for s, anchor in enumerate(trace.anchors.tolist()):
        accepted, rejected = int(trace.accepted[s]), int(trace.rejected_offset[s])
        committed = int(trace.committed[s])
        rows.append(
            {
                "trajectory_id": trajectory.trajectory_id,
                "step": s,
                "anchor": anchor,
                "accepted": accepted,
                "committed": committed,
                "rejected_offset": rejected,
                "proposed_ids": trace.proposed[s].tolist(),
                "target_logprobs": scores.target_logprobs[s].tolist(),
                "drafter_logprobs": trace.drafter_logprobs[s].tolist(),
                "committed_id": trajectory.tokens[anchor + accepted + 1] if committed > accepted else -1,
                "top_ids": scores.top_ids[s].tolist() if rejected else [],
                "top_logprobs": scores.top_logprobs[s].tolist() if rejected else [],
            }
        )
    return rows


def summarise(table: pa.Table, tokenizer: Any, block_size: int) -> dict[str, Any]:
    """Figures of a trace (VERIFY_STEPS): sums are divided once, at the end."""

    K = block_size - 1
    accepted = table["accepted"].to_numpy()
    judged = ~np.isnan(padded(table, "target_logprobs", K, np.nan, np.float32))  # the rest lies beyond the end
    kept = judged & (np.arange(K) < accepted[:, None])
    wrong = np.flatnonzero(table["rejected_offset"].to_numpy())
    proposed = padded(table, "proposed_ids", K, -1, np.int64)[wrong, accepted[wrong]]  # behind what was accepted
    corrected = table["committed_id"].to_numpy()[wrong]
    rejected = Counter[int](proposed.tolist())
    pairs = Counter[tuple[int, int]](zip(proposed.tolist(), corrected.tolist(), strict=True))
    return {
        "definition_of_tau": "committed tokens per verify step, the target's own token included (+1)",
        "tau": int(table["committed"].to_numpy().sum()) / table.num_rows,
        "steps": table.num_rows,
        "error_positions": len(wrong),
        "block_size": block_size,
        "acceptance_by_offset": [
            a / j if j else None for a, j in zip(kept.sum(0).tolist(), judged.sum(0).tolist(), strict=True)
        ],
        "accepted_histogram": np.bincount(accepted, minlength=K + 1).tolist(),
        "most_rejected": [
            {"token": tokenizer.decode([token]), "id": token, "count": count}
            for token, count in rejected.most_common(20)
        ],
        "most_frequent_corrections": [
            {"proposed": tokenizer.decode([a]), "committed": tokenizer.decode([b]), "count": count}
            for (a, b), count in pairs.most_common(20)
        ],
    }
