"""The target's log-probs of every proposal of a trace, the rejected suffixes on their draft-induced prefix included.

Up to the first rejection the prefix is the trajectory itself, whose hidden states are there already. Behind it the
prefix holds rejected proposals: those tokens are appended to the trajectory's cache as leaves of a tree, all verify
steps in one forward; each sees the trajectory up to its step's committed prefix and its own step's earlier proposals.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from stages.replay.trace import Trace
from stages.targets.causal_lm import Target
from stages.targets.slots import SlotCache


@dataclass(frozen=True)
class StepScores:
    """What the target said about each step of one trace (S steps, K proposals)."""

    target_logprobs: np.ndarray  # [S, K] float32, NaN where the trajectory ended before the proposal
    top_ids: np.ndarray  # [S, top_k] the target's best tokens at the rejected offset, -1 where nothing was rejected
    top_logprobs: np.ndarray  # [S, top_k] float32


def score_traces(
    target: Target,
    cache: SlotCache,
    hidden: torch.Tensor,
    traces: Sequence[Trace],
    *,
    top_k: int = 8,
    tree_tokens: int = 512,
    positions_per_chunk: int = 1024,
) -> list[StepScores]:
    """hidden [B, T, H] and `cache`: of a forward over the trajectories, rows 0 … B-1, with free entries from T on.

    tree_tokens: proposals a row that one forward appends (the mask has B * tree_tokens * (T + tree_tokens) entries).
    """
    T = hidden.shape[1]
    device = hidden.device
    K = traces[0].proposed.shape[1]
    scores = [np.full(t.proposed.shape, np.nan, dtype=np.float32) for t in traces]
    top_ids = [np.full((len(t.anchors), top_k), -1, dtype=np.int64) for t in traces]
    top_logprobs = [np.full((len(t.anchors), top_k), np.nan, dtype=np.float32) for t in traces]

    # ---- offsets up to the first rejection: predicted by the trajectory's own hidden states
    where = []  # (row, step, offset, position whose hidden state predicts it)
    for b, trace in enumerate(traces):
        known = np.minimum(trace.accepted + 1, trace.judged)
        for s, (anchor, count) in enumerate(zip(trace.anchors.tolist(), known.tolist(), strict=True)):
            where += [(b, s, k, anchor + k - 1) for k in range(1, count + 1)]
    for start in range(0, len(where), positions_per_chunk):
        part = where[start : start + positions_per_chunk]
        rows, steps, offsets, positions = (list(column) for column in zip(*part, strict=True))
        proposals = torch.tensor([int(traces[b].proposed[s, k - 1]) for b, s, k, _ in part], device=device)
        logits = target.logits(hidden[rows, positions])
        logprobs = torch.log_softmax(logits, -1)
        taken = logprobs.gather(1, proposals[:, None])[:, 0].cpu().numpy()
        best = logprobs.topk(top_k, -1)
        best_ids, best_logprobs = best.indices.cpu().numpy(), best.values.cpu().numpy()
        for i, (b, s, k) in enumerate(zip(rows, steps, offsets, strict=True)):
            scores[b][s, k - 1] = taken[i]
            if k == traces[b].rejected_offset[s]:
                top_ids[b][s], top_logprobs[b][s] = best_ids[i], best_logprobs[i]

    # ---- offsets behind it: leaves on the cache; leaf k (a rejected proposal) predicts offset k+1
    leaves: list[list[tuple[int, int]]] = [
        [
            (s, k)
            for s, first in enumerate(trace.rejected_offset.tolist())
            if first
            for k in range(first, min(K, int(trace.judged[s])))
        ]
        for trace in traces
    ]
    for chunk in _leaf_chunks(leaves, tree_tokens):
        _score_leaves(target, cache, T, traces, chunk, scores)
    return [StepScores(*parts) for parts in zip(scores, top_ids, top_logprobs, strict=True)]


def _leaf_chunks(leaves: list[list[tuple[int, int]]], tree_tokens: int) -> list[list[list[tuple[int, int]]]]:
    """Cut every row's leaves into runs of at most `tree_tokens`, never inside a step."""
    rows = []
    for row in leaves:
        runs: list[list[tuple[int, int]]] = [[]]
        for i, (s, k) in enumerate(row):
            begins_step = i == 0 or row[i - 1][0] != s
            step_size = next((j for j in range(i, len(row)) if row[j][0] != s), len(row)) - i if begins_step else 0
            if begins_step and runs[-1] and len(runs[-1]) + step_size > tree_tokens:
                runs.append([])
            runs[-1].append((s, k))
        rows.append(runs)
    count = max(len(runs) for runs in rows)
    chunks = [[runs[c] if c < len(runs) else [] for runs in rows] for c in range(count)]
    return [chunk for chunk in chunks if any(chunk)]


def _score_leaves(
    target: Target,
    cache: SlotCache,
    T: int,
    traces: Sequence[Trace],
    leaves: list[list[tuple[int, int]]],
    scores: list[np.ndarray],
) -> None:
    """One forward over the leaves of all rows, written to entries T, T+1, … of the cache (overwritten next time)."""
    B, M = len(traces), max(len(row) for row in leaves)
    ids = np.zeros((B, M), dtype=np.int64)
    positions = np.zeros((B, M), dtype=np.int64)
    visible = np.zeros((B, M, T + M), dtype=bool)
    for b, (trace, row) in enumerate(zip(traces, leaves, strict=True)):
        for m, (s, k) in enumerate(row):
            anchor, first = int(trace.anchors[s]), int(trace.rejected_offset[s])
            ids[b, m], positions[b, m] = trace.proposed[s, k - 1], anchor + k
            visible[b, m, : anchor + first] = True  # the committed prefix ends before the rejected offset
            visible[b, m, T + m - (k - first) : T + m + 1] = True
        visible[b, len(row) :, 0] = True  # padding must see something
    device = target.device
    out = target.step(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(positions).to(device),
        cache,
        slice(0, B),
        write_at=torch.arange(T, T + M, device=device).expand(B, -1),
        visible=torch.from_numpy(visible).to(device),
    )
    for b, row in enumerate(leaves):
        if not row:
            continue
        following = torch.tensor([int(traces[b].proposed[s, k]) for s, k in row], device=device)
        logprobs = torch.log_softmax(target.logits(out.hidden[b, : len(row)]), -1)
        for (s, k), value in zip(row, logprobs.gather(1, following[:, None])[:, 0].tolist(), strict=True):
            scores[b][s, k] = value  # leaf k predicts offset k+1, column k
