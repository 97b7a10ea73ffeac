"""Batches of trajectories with the target's features, recomputed where they are used and kept in memory while they fit.

Nothing of the size of a hidden state goes to disk. While memory holds the features of all trajectories they are
computed in fixed groups and kept. Where it does not, none are kept: of epochs that are drawn at random, what fits is
seldom what is drawn next. A batch's trajectories are then read in groups of their own. Either way the bits depend on
the batch alone, not on whether training was interrupted, nor on whether they were read ahead.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from draftsmith.stages.data.trajectories import Trajectory, groups_by_length, lengths_of, pad_tokens, responses_of
from draftsmith.stages.runtime.ranks import ALONE, Ranks
from draftsmith.stages.target.causal_lm import Target


@dataclass(frozen=True)
class Batch:
    """B trajectories, padded on the right to T positions."""

    trajectories: list[Trajectory]
    tokens: torch.Tensor  # [B, T]
    features: torch.Tensor  # [B, T, K*H], the target's dtype
    hidden: torch.Tensor | None  # [B, T, H] after the target's final norm: predicts the next position
    positions: torch.Tensor  # [B, T]

    def rows(self, part: slice) -> Batch:
        """Some of the trajectories, padded to the longest of them."""
        trajectories = self.trajectories[part]
        width = max(len(t.tokens) for t in trajectories)
        tokens, features, positions = (x[part, :width] for x in (self.tokens, self.features, self.positions))
        hidden = None if self.hidden is None else self.hidden[part, :width]
        return Batch(trajectories, tokens, features, hidden, positions)


@dataclass(frozen=True)
class Portion:
    """The rows of a step that one rank trains: those of its batch, in this order."""

    rows: list[int]  # of the step's rows
    count: int  # that the step has
    tokens: torch.Tensor  # [B, T] of the whole step: what a head must hold
    ranks: Ranks = ALONE

    @classmethod
    def of_all(cls, batch: Batch) -> Portion:
        """One process: the batch is the step."""
        count = len(batch.trajectories)
        return cls(list(range(count)), count, batch.tokens)

    @classmethod
    def of_rank(cls, trajectories: Sequence[Trajectory], ranks: Ranks, device: torch.device) -> Portion:
        """Of all trajectories of a step those that this rank trains."""
        rows = ranks.assigned_rows([len(t.tokens) for t in trajectories])
        return cls(rows, len(trajectories), pad_tokens(trajectories, device), ranks)


def parts_of(batch: Batch, block_tokens: int, limit: int | None) -> list[slice]:
    """Neighbouring rows as micro-batches of at most `limit` tokens, or of one row: padded trajectories, and
    block_tokens of blocks a row. None: all rows are one."""
    lengths = [len(t.tokens) for t in batch.trajectories]
    parts: list[slice] = []
    start, longest = 0, 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if limit is not None and row > start and (row + 1 - start) * (longest + block_tokens) > limit:
            parts.append(slice(start, row))
            start, longest = row, length
    return [*parts, slice(start, len(lengths))]


_Read = tuple[torch.Tensor, ...]  # features, and hidden states if they are wanted


class FeatureSource:
    """The target's features of a set of trajectories, by index."""

    def __init__(
        self,
        target: Target,
        layer_ids: Sequence[int],
        trajectories: Sequence[Trajectory],
        *,
        tokens_per_group: int = 2048,
        memory_mb: float = 2048,
        with_hidden: bool = True,
        ahead: bool | None = None,
    ):
        """tokens_per_group: read by the target in one forward. memory_mb: features are kept if it holds those of all.

        with_hidden: for losses that ask for the target's distribution; without, its last layers are not run. ahead:
        whether `prefetch` does anything; left out: where it takes no time from anything else, on CUDA.
        """
        self.with_hidden = with_hidden
        self.target, self.layer_ids, self.trajectories = target, tuple(layer_ids), trajectories
        self._lengths = lengths = lengths_of(trajectories)
        width = target.head_weight.shape[1] * (len(self.layer_ids) + with_hidden)
        self._kept = int(lengths.sum()) * width * target.dtype.itemsize <= memory_mb * 2**20
        self._tokens_per_group = tokens_per_group
        self._groups = list(groups_by_length(lengths, tokens_per_group)) if self._kept else []
        self._group_of = {index: g for g, group in enumerate(self._groups) for index in group}
        self._cache: dict[int, dict[int, _Read]] = {}
        on_cuda = target.device.type == "cuda"
        # not of a shared target, whose parts would talk beside the gradients: two kinds of messages in any order
        self._reads_ahead = not self._kept and target.sharing == 1 and (on_cuda if ahead is None else ahead)
        self._stream = torch.cuda.Stream(target.device) if self._reads_ahead and on_cuda else None
        self._ahead: tuple[tuple[int, ...], dict[int, _Read]] | None = None

    def own(self, indices: Sequence[int], ranks: Ranks) -> list[int]:
        """Those of a step's trajectories that this rank trains."""
        return [indices[row] for row in ranks.assigned_rows(self._lengths[list(indices)].tolist())]

    def shared(self, indices: Sequence[int], ranks: Ranks) -> list[int]:
        """Those of a step's trajectories that any rank trains which shares the target with this one."""
        lengths = self._lengths[list(indices)].tolist()
        rows = sorted(row for rank in ranks.target_group for row in ranks.assigned_rows(lengths, rank))
        return [indices[row] for row in rows]

    def prefetch(self, indices: Sequence[int]) -> None:
        """Begin to read what the next `batch` will ask for: on CUDA in a stream of its own, beside what is queued from
        here on. Memory then holds the features of two batches."""
        if not self._reads_ahead:
            return
        beside: AbstractContextManager[object] = nullcontext()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.target.device))
            beside = torch.cuda.stream(self._stream)
        with beside:
            self._ahead = tuple(indices), self._all_of(indices)

    def _found(self, indices: Sequence[int], shared: Sequence[int]) -> dict[int, _Read]:
        """What was read ahead, if that was for these; else read here, with all that is `shared`."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != tuple(indices):
            return self._all_of(shared, wanted=set(indices))
        if self._stream is not None:
            here = torch.cuda.current_stream(self.target.device)
            here.wait_stream(self._stream)
            for read in ahead[1].values():
                for part in read:
                    part.record_stream(here)  # made in the other stream, which must not have its memory back too early
        return ahead[1]

    def _all_of(self, indices: Sequence[int], wanted: Set[int] | None = None) -> dict[int, _Read]:
        """What the target says of these trajectories, or of those of them that are wanted."""
        found: dict[int, _Read] = {}
        if self._kept:
            for g in dict.fromkeys(self._group_of[i] for i in indices):
                if g not in self._cache:
                    self._cache[g] = self._of_group(self._groups[g], self._tokens_of(self._groups[g]))
                found |= self._cache[g]
            return found
        drawn = list(dict.fromkeys(indices))
        groups = [[drawn[place] for place in g] for g in groups_by_length(self._lengths[drawn], self._tokens_per_group)]
        tokens = [self._tokens_of(group) for group in groups]  # all first: a copy would wait for the forward before it
        for group, ids in zip(groups, tokens, strict=True):
            read = self._of_group(group, ids)
            found |= read if wanted is None else {i: read[i] for i in group if i in wanted}
        return found

    def _tokens_of(self, members: Sequence[int]) -> torch.Tensor:
        return pad_tokens([self.trajectories[i] for i in members], self.target.device)

    def _of_group(self, members: Sequence[int], ids: torch.Tensor) -> dict[int, _Read]:
        """Of trajectories that the target reads in one forward. ids: their tokens [n, T]."""
        with torch.autocast(self.target.device.type, enabled=False):  # the training loop's is for the drafter alone
            read = self._read(ids)
        lengths = self._lengths[list(members)].tolist()
        return {
            i: tuple(part[row, :n].clone() for part in read)
            for row, (i, n) in enumerate(zip(members, lengths, strict=True))
        }

    def _read(self, ids: torch.Tensor) -> _Read:
        if not self.with_hidden:
            return (self.target.features(ids, self.layer_ids),)
        out = self.target.read(ids, self.layer_ids)
        assert out.features is not None
        return out.features, out.hidden

    def batch(self, indices: Sequence[int], shared: Sequence[int] | None = None) -> Batch:
        """The trajectories at `indices`, with their features. shared: with those of other ranks, which read them now
        too, by parts of the target that need each other; left out: these alone."""
        trajectories = [self.trajectories[i] for i in indices]
        found = self._found(indices, indices if shared is None else shared)
        parts = [found[i] for i in indices]
        features, *hidden = (
            torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True) for rows in zip(*parts, strict=True)
        )
        positions = torch.arange(features.shape[1], device=features.device).expand(len(indices), -1)
        tokens = pad_tokens(trajectories, features.device)
        return Batch(trajectories, tokens, features, hidden[0] if hidden else None, positions)


def trajectories_of_step(count: int, per_step: int, step: int, seed: int) -> list[int]:
    """Which trajectories step `step` trains on: epochs of seeded permutations, cut without gaps. Stateless."""
    indices = []
    for drawn in range(step * per_step, (step + 1) * per_step):
        epoch, place = divmod(drawn, count)
        indices.append(int(_permutation(count, seed, epoch)[place]))
    return indices


@functools.lru_cache(maxsize=2)  # a step may span the end of an epoch
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The random numbers of one step: the same whether or not training was interrupted before it."""
    return np.random.default_rng([seed, 1, step])


def token_counts(trajectories: Sequence[Trajectory], vocab_size: int) -> torch.Tensor:
    """How often each token [V] occurs in the responses."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for tokens in responses_of(trajectories):
        counts += np.bincount(tokens, minlength=vocab_size)
    return torch.from_numpy(counts)


def frequent_tokens(counts: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """All token ids [V], most frequent first; ties by id, or in the order that they had `before` [V]."""
    if before is None:
        return counts.argsort(descending=True, stable=True)
    return before[counts[before].argsort(descending=True, stable=True)]
