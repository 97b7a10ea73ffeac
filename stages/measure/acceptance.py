"""Acceptance of several drafters on identical trajectories: paired, so that small differences become visible."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from draftsmith.stages.measure.bootstrap import interval, ratio, ratio_difference
from draftsmith.stages.replay.trace import Trace, Trajectory
from draftsmith.stages.targets.causal_lm import Target


def ceiling_traces(target: Target, trajectories: Sequence[Trajectory], block_size: int) -> list[Trace]:
    """Traces of a perfect drafter: every proposal is the target's own best token. Its tau is what no drafter can pass.

    In greedy trajectories everything is accepted, so only blocks that are cut by the end keep it below `block_size`.
    """
    K = block_size - 1
    traces = []
    for trajectory in trajectories:
        tokens = torch.tensor([trajectory.tokens], device=target.device)
        hidden = target.read(tokens).hidden[0, trajectory.first_anchor : -1]
        best = np.concatenate([target.logits(part).argmax(-1).cpu().numpy() for part in hidden.split(1024)])
        anchors, accepted, proposed = [], [], []
        anchor = trajectory.first_anchor
        while anchor <= trajectory.last_anchor:
            ahead = best[anchor - trajectory.first_anchor :][:K]
            right = ahead == np.array(trajectory.tokens[anchor + 1 :][:K])
            kept = len(right) if right.all() else int(right.argmin())
            anchors.append(anchor)
            accepted.append(kept)
            proposed.append(np.pad(ahead, (0, K - len(ahead))))
            anchor += kept + 1
        unknown = np.full((len(anchors), K), np.nan, dtype=np.float32)
        length = len(trajectory.tokens)
        steps = np.array(anchors, dtype=np.int64), np.array(accepted, dtype=np.int64), np.stack(proposed)
        traces.append(Trace(length, *steps, unknown, len(anchors)))
    return traces


def has_loop(tokens: Sequence[int], n: int = 6, times: int = 3) -> bool:
    """Does the answer repeat an n-gram `times` times? Its tau may then say little about other text."""
    counts: dict[tuple[int, ...], int] = {}
    for i in range(len(tokens) - n + 1):
        gram = tuple(tokens[i : i + n])
        counts[gram] = counts.get(gram, 0) + 1
        if counts[gram] >= times:
            return True
    return False


def acceptance_table(
    traces: Mapping[str, Sequence[Trace]], looping: Sequence[bool], resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Figures of each drafter; differences are to the drafter named `sft`, paired over trajectories; else none."""
    sums = {name: _sums(found) for name, found in traces.items()}
    keep = ~np.asarray(looping)
    table: dict[str, dict[str, Any]] = {}
    for name, (committed, steps) in sums.items():
        low, high = interval(ratio, (committed, steps), resamples, seed)
        K = traces[name][0].proposed.shape[1]
        accepted = np.concatenate([t.accepted for t in traces[name]])
        judged = np.concatenate([t.judged for t in traces[name]])
        table[name] = {
            "tau": float(ratio(committed, steps)),
            "tau_low": low,
            "tau_high": high,
            "verify_steps": int(steps.sum()),
            "block_size": K + 1,
            "acceptance_by_offset": [
                float((accepted >= k).sum() / max(1, (judged >= k).sum())) for k in range(1, K + 1)
            ],
            "accepted_histogram": np.bincount(accepted, minlength=K + 1).tolist(),
            "tau_without_loops": float(ratio(committed[keep], steps[keep])) if keep.any() else None,
        }
        if name != "sft" and "sft" in sums:
            paired = (committed, steps, *sums["sft"])
            low, high = interval(ratio_difference, paired, resamples, seed)
            table[name] |= {"diff_to_sft": float(ratio_difference(*paired)), "diff_low": low, "diff_high": high}
    if {"opd", "control"} <= sums.keys():
        paired = (*sums["opd"], *sums["control"])
        low, high = interval(ratio_difference, paired, resamples, seed)
        table["opd"] |= {
            "diff_to_control": float(ratio_difference(*paired)),
            "diff_to_control_low": low,
            "diff_to_control_high": high,
        }
    return table


def _sums(traces: Sequence[Trace]) -> tuple[np.ndarray, np.ndarray]:
    """Committed tokens and verify steps of each trajectory."""
    committed = np.array([t.committed.sum() for t in traces], dtype=np.float64)
    return committed, np.array([len(t.anchors) for t in traces], dtype=np.float64)
