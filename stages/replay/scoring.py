"""Scores traces: the target's log-probs of every proposal, also of rejected suffixes on their drafted prefix.

Up to the first rejection the prefix is the trajectory itself, whose hidden states are known already. After it the
prefix holds rejected proposals: those tokens are appended to the trajectory's cache as leaves of a tree, all verify
steps in one forward; each sees the trajectory up to its step's committed prefix and its own step's earlier proposals.
A target with recurrent layers has no forward over a tree: it reads the trajectory once more, stops at each rejection,
and continues with that step's proposals from the states that it has there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory
from draftsmith.stages.replay.groups import EncodedGroup, Group, KeptGroup, encode_group, group_indices, tree_tokens_of
from draftsmith.stages.replay.options import POSITIONS_PER_CHUNK
from draftsmith.stages.replay.steps import Steps, recorded_steps
from draftsmith.stages.runtime.memory import to_device
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.kv_cache import Rows

# Rows are scored together while padding stays below this share of the leaves, or below a number of tokens that
# hardly slows a forward: every forward has a fixed cost too.
PADDING_SHARE = 0.25
FREE_PADDING = 64


def score(
    target: Target,
    trajectories: Sequence[Trajectory],
    traces: Sequence[Steps],
    tokens_per_group: int,
    kept: Sequence[KeptGroup] = (),
    *,
    offsets: int | None = None,
) -> list[Steps]:
    """Score the rejected proposals in each trajectory's given steps, in the trajectories' order.

    kept: forwards of the target over all of these trajectories; by default it reads them again. offsets: number of
    offsets scored in a step, from the rejected one on; None: all.
    """
    scores: dict[int, Steps] = {}
    with torch.autocast(target.device.type, enabled=False):  # a training loop's autocast is only for the drafter
        for indices, encoded in _encoded(target, trajectories, traces, tokens_per_group, kept):
            of_group = [_NO_STEPS if i is None else traces[i] for i in indices]
            scored = score_traces(target, encoded, of_group, rejected_only=True, offsets=offsets)
            scores |= {i: of_trace for i, of_trace in zip(indices, scored, strict=True) if i is not None}
    return [scores[i] for i in range(len(trajectories))]


_NO_STEPS = recorded_steps(0, [])


def _encoded(
    target: Target,
    trajectories: Sequence[Trajectory],
    traces: Sequence[Steps],
    tokens_per_group: int,
    kept: Sequence[KeptGroup],
) -> Iterator[tuple[list[int | None], EncodedGroup]]:
    """Yield forwards over the trajectories, and each row's trajectory; None: an unused row."""
    if not kept:
        tree_tokens = tree_tokens_of(traces[0].proposed.shape[1] + 1)
        for indices in group_indices(trajectories, tokens_per_group):
            group = Group.padded([trajectories[i] for i in indices], target.device)
            yield [*indices], encode_group(target, group.ids, (), tree_tokens)
        return
    waiting: dict[str, list[int]] = {}
    for i, trajectory in enumerate(trajectories):
        waiting.setdefault(trajectory.trajectory_id, []).append(i)
    for names, encoded in kept:
        of_rows = [waiting.get(name, []) for name in names]
        while any(of_rows):  # a step may hold a trajectory twice
            yield [indices.pop() if indices else None for indices in of_rows], encoded


def score_traces(
    target: Target,
    group: EncodedGroup,
    traces: Sequence[Steps],
    *,
    rejected_only: bool = False,
    offsets: int | None = None,
) -> list[Steps]:
    """Return the traces of a group with the target's log-probs of their proposals, and of its best tokens.

    Without a cache nothing after the first rejected proposal of a step is scored. With one, a forward appends at most
    `group.tree_tokens` proposals to a row: its mask has B * tree_tokens * (T + tree_tokens) entries.
    rejected_only: accepted proposals are not scored (NaN). offsets: same as in `score`.
    """
    device = group.hidden.device
    scores = [np.full(t.proposed.shape, np.nan, dtype=np.float32) for t in traces]
    best = [np.full(len(t), np.nan, dtype=np.float32) for t in traces]

    # ---- offsets up to the first rejection: predicted by the trajectory's hidden states
    begin = [t.accepted if rejected_only else np.zeros_like(t.anchors) for t in traces]
    on_trajectory = _Proposals.from_traces(traces, begin, [t.on_trajectory for t in traces])
    for start in range(0, len(on_trajectory.row), POSITIONS_PER_CHUNK):
        chunk = on_trajectory.select(slice(start, start + POSITIONS_PER_CHUNK))
        logits = target.logits(
            group.hidden[tuple(to_device(np.stack([chunk.row, chunk.anchor + chunk.column]), device))]
        )
        total = logits.logsumexp(-1)
        chunk.write(scores, _logprobs(logits, total, chunk.token))
        rejected = np.flatnonzero(chunk.column + 1 == chunk.rejected_offset)
        index = to_device(rejected, device)
        values = (logits[index].amax(-1) - total[index]).cpu().numpy()
        for b, s, value in zip(chunk.row[rejected], chunk.step[rejected], values, strict=True):
            best[b][s] = value
    scored = [
        replace(trace, target_logprobs=logprobs, best_logprob=of_best)
        for trace, logprobs, of_best in zip(traces, scores, best, strict=True)
    ]
    if group.cache is None:
        return scored

    # ---- later offsets: leaves on the cache; a rejected proposal predicts the one after it
    firsts = [t.rejected_offset for t in traces]
    ends = [np.minimum(t.judged, first + (offsets or t.width) - 1) for t, first in zip(traces, firsts, strict=True)]
    leaves = _Proposals.from_traces(
        traces,
        [np.maximum(first - 1, 0) for first in firsts],
        [np.where(first > 0, end - 1, 0) for first, end in zip(firsts, ends, strict=True)],
    )
    if target.layers.recurrent:
        _score_one_by_one(target, group, leaves, traces, scores)
    else:
        for chunk in _leaf_chunks(leaves, group.tree_tokens):
            _score_leaves(target, group, chunk, traces, scores)
    return scored


@dataclass(frozen=True)
class _Proposals:
    """Proposals of several traces, flat, in the order of row, step and offset: every field is [N]."""

    row: np.ndarray
    step: np.ndarray
    column: np.ndarray  # offset - 1
    within: np.ndarray  # index within its step
    anchor: np.ndarray
    rejected_offset: np.ndarray
    token: np.ndarray

    @classmethod
    def from_traces(cls, traces: Sequence[Steps], first: Sequence[np.ndarray], end: Sequence[np.ndarray]) -> _Proposals:
        """Take columns first … end-1 of every step. first, end: [S] for each trace."""
        by_trace = []
        for row, (trace, begin, stop) in enumerate(zip(traces, first, end, strict=True)):
            counts = np.maximum(stop - begin, 0)
            step = np.repeat(np.arange(len(counts)), counts)
            within = np.arange(len(step)) - np.repeat(np.cumsum(counts) - counts, counts)
            column = begin[step] + within
            by_trace.append(
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
        return cls(*(np.concatenate([getattr(proposals, f.name) for proposals in by_trace]) for f in fields(cls)))

    def select(self, which: slice | np.ndarray) -> _Proposals:
        return _Proposals(*(getattr(self, f.name)[which] for f in fields(self)))

    def write(self, scores: list[np.ndarray], values: np.ndarray, shift: int = 0) -> None:
        """Write values [N] of these proposals, or of those `shift` offsets after them."""
        for row in np.unique(self.row):
            in_row = self.row == row
            scores[row][self.step[in_row], self.column[in_row] + shift] = values[in_row]


def _cache_rows(rows: np.ndarray, device: torch.device) -> Rows:
    """Return sorted rows of the cache, as a slice if they are neighbours: a slice is read in place."""
    first, end = int(rows[0]), int(rows[-1]) + 1
    return slice(first, end) if end - first == len(rows) else to_device(rows, device)


def _logprobs(logits: torch.Tensor, total: torch.Tensor, tokens: np.ndarray) -> np.ndarray:
    """Return the log-probs of one token per row, without a log-softmax of the whole vocabulary."""
    chosen = logits.gather(1, to_device(tokens, logits.device)[:, None])[:, 0]
    return (chosen - total).cpu().numpy()


def _leaf_chunks(leaves: _Proposals, tree_tokens: int) -> Iterator[_Proposals]:
    """Yield the leaves of each forward: at most `tree_tokens` of a row, whole steps, rows of similar counts."""
    chunk = np.zeros(len(leaves.row), dtype=np.int64)
    starts = np.flatnonzero(leaves.within == 0)
    if not len(starts):
        return  # only last proposals were rejected
    row, run, size = -1, 0, 0
    for start, end in zip(starts, np.append(starts[1:], len(chunk)), strict=True):
        if leaves.row[start] != row:
            row, run, size = leaves.row[start], 0, 0
        if size and size + end - start > tree_tokens:
            run, size = run + 1, 0
        chunk[start:end] = run
        size += end - start
    for c in range(chunk.max() + 1):
        part = leaves.select(chunk == c)
        for rows in _similar_rows(np.bincount(part.row)):
            yield part.select(np.isin(part.row, rows))


def _similar_rows(counts: np.ndarray) -> Iterator[list[int]]:
    """Yield groups of rows with about equally many leaves, because padding costs as much as leaves.

    Rows without leaves are skipped.
    """
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
    group: EncodedGroup,
    leaves: _Proposals,
    traces: Sequence[Steps],
    scores: list[np.ndarray],
) -> None:
    """Run one forward over these leaves. It writes to entries T, T+1, … of the cache, which the next one overwrites."""
    assert group.cache is not None
    T = group.ids.shape[1]
    cache_rows, row = np.unique(leaves.row, return_inverse=True)
    counts = np.bincount(row)
    R, M = len(counts), int(counts.max())
    slot = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)  # index among the leaves of its row
    ids, positions = np.zeros((R, M), dtype=np.int64), np.zeros((R, M), dtype=np.int64)
    ids[row, slot], positions[row, slot] = leaves.token, leaves.anchor + leaves.column + 1
    # a leaf sees the committed prefix, which ends before the rejected offset, and its step's leaves up to itself
    committed, own = np.ones((R, M), dtype=np.int64), np.full((R, M), M)  # padding must see something
    committed[row, slot], own[row, slot] = leaves.anchor + leaves.rejected_offset, slot - leaves.within
    device = target.device
    token_ids, at, begin, end = to_device(np.stack([ids, positions, own, committed]), device)
    order = torch.arange(M, device=device)
    own_step = (order >= begin[..., None]) & (order <= order[:, None])
    prefix = torch.arange(T, device=device) < end[..., None]
    out = target.step(
        token_ids,
        at,
        group.cache,
        _cache_rows(cache_rows, device),
        write_at=torch.arange(T, T + M, device=device).expand(R, -1),
        visible=torch.cat([prefix, own_step], -1),
    )
    hidden = out.hidden[tuple(to_device(np.stack([row, slot]), device))]
    for start in range(0, len(row), POSITIONS_PER_CHUNK):
        part = slice(start, start + POSITIONS_PER_CHUNK)
        _write_following(target, hidden[part], leaves.select(part), traces, scores)


def _write_following(
    target: Target, hidden: torch.Tensor, leaves: _Proposals, traces: Sequence[Steps], scores: list[np.ndarray]
) -> None:
    """Write the log-probs of the proposals after rejected ones, whose hidden states [N, H] predict them."""
    following = np.array(
        [traces[b].proposed[s, c + 1] for b, s, c in zip(leaves.row, leaves.step, leaves.column, strict=True)]
    )
    logits = target.logits(hidden)
    leaves.write(scores, _logprobs(logits, logits.logsumexp(-1), following), shift=1)


def _score_one_by_one(
    target: Target, group: EncodedGroup, leaves: _Proposals, traces: Sequence[Steps], scores: list[np.ndarray]
) -> None:
    """Run two short forwards per rejection: over the text up to it, and over the proposals from it on.

    The latter does not advance states, and writes entries that the text after it replaces.
    """
    assert group.cache is not None
    ids, cache = group.ids, group.cache
    starts = np.flatnonzero(leaves.within == 0)
    ends = np.append(starts[1:], len(leaves.row))
    committed = (leaves.anchor + leaves.rejected_offset)[starts]  # positions before the rejected proposal
    row = read = -1
    for index in np.lexsort((committed, leaves.row[starts])):  # blocks may overlap: in the order of their rejections
        step, end = leaves.select(slice(starts[index], ends[index])), int(committed[index])
        if step.row[0] != row:
            row, read = int(step.row[0]), 0
        at = slice(row, row + 1)
        if read < end:
            target.step(ids[at, read:end], torch.arange(read, end, device=ids.device)[None], cache, at, length=end)
        read = end
        tokens, following = to_device(step.token, ids.device)[None], end + len(step.row)
        positions = torch.arange(end, following, device=ids.device)[None]
        out = target.step(tokens, positions, cache, at, length=following, advance=False)
        _write_following(target, out.hidden[0], step, traces, scores)
