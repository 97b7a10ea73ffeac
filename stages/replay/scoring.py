"""The target's log-probs of every proposal of a trace, the rejected suffixes on their draft-induced prefix included.

Up to the first rejection the prefix is the trajectory itself, whose hidden states are there already. Behind it the
prefix holds rejected proposals: those tokens are appended to the trajectory's cache as leaves of a tree, all verify
steps in one forward; each sees the trajectory up to its step's committed prefix and its own step's earlier proposals.
A target with recurrent layers has no forward over a tree: it reads the trajectory once more, stops at each rejection,
and follows that step's proposals from the states which it has there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from draftsmith.stages.replay.options import POSITIONS_PER_CHUNK, TREE_TOKENS
from draftsmith.stages.replay.trace import Trace
from draftsmith.stages.target.causal_lm import Target
from draftsmith.stages.target.kv_cache import Rows, SlotCache

# Rows are scored together while padding stays below this share of the leaves, or below a number of tokens that a
# forward hardly notices: every forward has a fixed cost too.
PADDING_SHARE = 0.25
FREE_PADDING = 64


@dataclass(frozen=True)
class StepScores:
    """What the target said about each step of one trace (S steps, K proposals)."""

    target_logprobs: np.ndarray  # [S, K] float32, NaN where the trajectory ended before the proposal, or not scored
    best_logprob: np.ndarray  # [S] float32, of the target's best token at the rejected offset, NaN without a rejection


def score_traces(
    target: Target,
    cache: SlotCache | None,
    hidden: torch.Tensor,
    traces: Sequence[Trace],
    *,
    ids: torch.Tensor | None = None,
    tree_tokens: int = TREE_TOKENS,
    positions_per_chunk: int = POSITIONS_PER_CHUNK,
    rejected_only: bool = False,
) -> list[StepScores]:
    """Return the target's log-probs of the proposals of some traces.

    hidden [B, T, H] and `cache`: of a forward over the trajectories, rows 0 … B-1, with free entries from T on. Without
    a cache nothing after the first rejected proposal of a step is scored.
    ids: [B, T] of the trajectories, which a target without a forward over a tree reads again.
    tree_tokens: proposals a row that one forward appends (the mask has B * tree_tokens * (T + tree_tokens) entries).
    rejected_only: those that were accepted are not scored (NaN).
    """
    T = hidden.shape[1]
    device = hidden.device
    scores = [np.full(t.proposed.shape, np.nan, dtype=np.float32) for t in traces]
    best = [np.full(len(t.anchors), np.nan, dtype=np.float32) for t in traces]

    # ---- offsets up to the first rejection: predicted by the trajectory's own hidden states
    begin = [t.accepted if rejected_only else np.zeros_like(t.anchors) for t in traces]
    known = _Proposals.of(traces, begin, [t.on_trajectory for t in traces])
    for start in range(0, len(known.row), positions_per_chunk):
        part = known.part(slice(start, start + positions_per_chunk))
        rows = torch.from_numpy(part.row).to(device)
        logits = target.logits(hidden[rows, torch.from_numpy(part.anchor + part.column).to(device)])
        total = logits.logsumexp(-1)
        part.write(scores, _logprobs(logits, total, part.token))
        rejected = np.flatnonzero(part.column + 1 == part.rejected_offset)
        index = torch.from_numpy(rejected).to(device)
        values = (logits[index].amax(-1) - total[index]).cpu().numpy()
        for b, s, value in zip(part.row[rejected], part.step[rejected], values, strict=True):
            best[b][s] = value
    found = [StepScores(*of_trace) for of_trace in zip(scores, best, strict=True)]
    if cache is None:
        return found

    # ---- offsets behind it: leaves on the cache; a rejected proposal predicts the one behind it
    leaves = _Proposals.of(
        traces,
        [np.maximum(t.rejected_offset - 1, 0) for t in traces],
        [np.where(t.rejected_offset > 0, t.judged - 1, 0) for t in traces],
    )
    if target.layers.recurrent:
        assert ids is not None, "a recurrent target reads the trajectories again"
        _score_one_by_one(target, cache, ids, leaves, traces, scores)
    else:
        for chunk in _leaf_chunks(leaves, tree_tokens):
            _score_leaves(target, cache, T, chunk, traces, scores, positions_per_chunk)
    return found


@dataclass(frozen=True)
class _Proposals:
    """Some proposals of some traces, flat, in the order of row, step and offset: every field is [N]."""

    row: np.ndarray
    step: np.ndarray
    column: np.ndarray  # offset - 1
    within: np.ndarray  # place among those of its step, from 0
    anchor: np.ndarray
    rejected_offset: np.ndarray
    token: np.ndarray

    @classmethod
    def of(cls, traces: Sequence[Trace], first: Sequence[np.ndarray], end: Sequence[np.ndarray]) -> _Proposals:
        """Columns first … end-1 of every step, both [S] for each trace."""
        parts = []
        for row, (trace, begin, stop) in enumerate(zip(traces, first, end, strict=True)):
            counts = np.maximum(stop - begin, 0)
            step = np.repeat(np.arange(len(counts)), counts)
            within = np.arange(len(step)) - np.repeat(np.cumsum(counts) - counts, counts)
            column = begin[step] + within
            parts.append(
                cls(
                    np.full(len(step), row),
                    step,
                    column,
                    within,
                    trace.anchors[step],
                    trace.rejected_offset[step],
                    trace.proposed[step, column],
                )
            )
        return cls(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(cls)))

    def part(self, which: slice | np.ndarray) -> _Proposals:
        return _Proposals(*(getattr(self, f.name)[which] for f in fields(self)))

    def write(self, scores: list[np.ndarray], values: np.ndarray, behind: int = 0) -> None:
        """values [N]: of these proposals, or of those `behind` offsets further on."""
        for row in np.unique(self.row):
            mine = self.row == row
            scores[row][self.step[mine], self.column[mine] + behind] = values[mine]


def _addressed(rows: np.ndarray, device: torch.device) -> Rows:
    """Sorted rows of the cache; neighbours are read in place."""
    first, end = int(rows[0]), int(rows[-1]) + 1
    return slice(first, end) if end - first == len(rows) else torch.from_numpy(rows).to(device)


def _logprobs(logits: torch.Tensor, total: torch.Tensor, tokens: np.ndarray) -> np.ndarray:
    """Of one token a row, without a log-softmax of the whole vocabulary."""
    taken = logits.gather(1, torch.from_numpy(tokens).to(logits.device)[:, None])[:, 0]
    return (taken - total).cpu().numpy()


def _leaf_chunks(leaves: _Proposals, tree_tokens: int) -> Iterator[_Proposals]:
    """Leaves for one forward each: at most `tree_tokens` of a row, whole steps, and rows of similar counts."""
    chunk = np.zeros(len(leaves.row), dtype=np.int64)
    starts = np.flatnonzero(leaves.within == 0)
    if not len(starts):
        return  # nothing was rejected but last proposals
    row, run, size = -1, 0, 0
    for start, end in zip(starts, np.append(starts[1:], len(chunk)), strict=True):
        if leaves.row[start] != row:
            row, run, size = leaves.row[start], 0, 0
        if size and size + end - start > tree_tokens:
            run, size = run + 1, 0
        chunk[start:end] = run
        size += end - start
    for c in range(chunk.max() + 1):
        part = leaves.part(chunk == c)
        for rows in _similar_rows(np.bincount(part.row)):
            yield part.part(np.isin(part.row, rows))


def _similar_rows(counts: np.ndarray) -> Iterator[list[int]]:
    """Rows with about equally many leaves, for padding is computed like leaves. Rows without any are left out."""
    group: list[int] = []
    padding = leaves = 0
    for row in np.argsort(-counts, kind="stable").tolist():
        if not counts[row]:
            break
        more = int(counts[group[0]] - counts[row]) if group else 0
        if padding + more > max(FREE_PADDING, PADDING_SHARE * leaves):
            yield group
            group, padding, leaves, more = [], 0, 0, 0
        group, padding, leaves = [*group, row], padding + more, leaves + int(counts[row])
    if group:
        yield group


def _score_leaves(
    target: Target,
    cache: SlotCache,
    T: int,
    leaves: _Proposals,
    traces: Sequence[Trace],
    scores: list[np.ndarray],
    positions_per_chunk: int,
) -> None:
    """One forward over some leaves, written to entries T, T+1, … of the cache (overwritten next time)."""
    cache_rows, row = np.unique(leaves.row, return_inverse=True)
    counts = np.bincount(row)
    R, M = len(counts), int(counts.max())
    slot = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)  # place among the leaves of its row
    ids, positions = np.zeros((R, M), dtype=np.int64), np.zeros((R, M), dtype=np.int64)
    ids[row, slot], positions[row, slot] = leaves.token, leaves.anchor + leaves.column + 1
    # a leaf sees the committed prefix, which ends before the rejected offset, and its step's leaves up to itself
    committed, own = np.ones((R, M), dtype=np.int64), np.full((R, M), M)  # padding must see something
    committed[row, slot], own[row, slot] = leaves.anchor + leaves.rejected_offset, slot - leaves.within
    device = target.device
    order = torch.arange(M, device=device)
    own_step = (order >= torch.from_numpy(own).to(device)[..., None]) & (order <= order[:, None])
    prefix = torch.arange(T, device=device) < torch.from_numpy(committed).to(device)[..., None]
    out = target.step(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(positions).to(device),
        cache,
        _addressed(cache_rows, device),
        write_at=torch.arange(T, T + M, device=device).expand(R, -1),
        visible=torch.cat([prefix, own_step], -1),
    )
    hidden = out.hidden[torch.from_numpy(row).to(device), torch.from_numpy(slot).to(device)]
    for start in range(0, len(row), positions_per_chunk):
        some = slice(start, start + positions_per_chunk)
        _write_following(target, hidden[some], leaves.part(some), traces, scores)


def _write_following(
    target: Target, hidden: torch.Tensor, leaves: _Proposals, traces: Sequence[Trace], scores: list[np.ndarray]
) -> None:
    """hidden [N, H] of rejected proposals: each predicts the proposal behind it."""
    following = np.array(
        [traces[b].proposed[s, c + 1] for b, s, c in zip(leaves.row, leaves.step, leaves.column, strict=True)]
    )
    logits = target.logits(hidden)
    leaves.write(scores, _logprobs(logits, logits.logsumexp(-1), following), behind=1)


def _score_one_by_one(
    target: Target,
    cache: SlotCache,
    ids: torch.Tensor,
    leaves: _Proposals,
    traces: Sequence[Trace],
    scores: list[np.ndarray],
) -> None:
    """Two short forwards a rejection: over the text up to it, and over the proposals from it on.

    The latter leave the states as they are, and write entries that the text behind them replaces.
    """
    starts = np.flatnonzero(leaves.within == 0)
    ends = np.append(starts[1:], len(leaves.row))
    committed = (leaves.anchor + leaves.rejected_offset)[starts]  # positions before the rejected one
    row = read = -1
    for place in np.lexsort((committed, leaves.row[starts])):  # blocks may overlap: in the order of their rejections
        step, end = leaves.part(slice(starts[place], ends[place])), int(committed[place])
        if step.row[0] != row:
            row, read = int(step.row[0]), 0
        at = slice(row, row + 1)
        if read < end:
            target.step(ids[at, read:end], torch.arange(read, end, device=ids.device)[None], cache, at)
        read = end
        tokens = torch.from_numpy(step.token).to(ids.device)[None]
        positions = end + torch.arange(len(step.row), device=ids.device)[None]
        out = target.step(tokens, positions, cache, at, advance=False)
        _write_following(target, out.hidden[0], step, traces, scores)
