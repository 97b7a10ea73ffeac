"""Batches of answers with the target's features, kept in memory if they fit and otherwise computed when needed.

If the target scores proposals in a step, the keys and values of its first read are kept for that, if they fit. Nothing
of the size of a hidden state goes to disk. If memory holds the features of all answers, they are computed in fixed
groups and kept. If not, none are kept: epochs are shuffled, so a kept part is seldom needed next, and the answers of
each batch are read in groups of similar length. Either way the bits depend only on the batch, not on whether training
was interrupted or features were read ahead.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from draftsmith.stages.data.trajectories import (
    Trajectory,
    answer_tokens,
    group_by_length,
    pad_tokens,
    trajectory_ids,
    trajectory_lengths,
)
from draftsmith.stages.replay.groups import KeptGroup, encode_group
from draftsmith.stages.runtime.ranks import ALONE, Ranks
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.estimate import ModelSize
from draftsmith.stages.training.config import TrainingConfig


@dataclass(frozen=True)
class Batch:
    """B trajectories, padded on the right to T positions."""

    trajectories: list[Trajectory]
    tokens: torch.Tensor  # [B, T]
    features: torch.Tensor  # [B, T, K*H], the target's dtype
    hidden: torch.Tensor | None  # [B, T, H] after the target's final norm: predicts the next position
    positions: torch.Tensor  # [B, T]
    kept: Sequence[KeptGroup] = ()  # the forwards of the step, if proposals are scored on their keys and values

    def select(self, rows: slice) -> Batch:
        """Return some of the trajectories, padded to the longest of these."""
        trajectories = self.trajectories[rows]
        width = max(len(t.tokens) for t in trajectories)
        tokens, features, positions = (x[rows, :width] for x in (self.tokens, self.features, self.positions))
        hidden = None if self.hidden is None else self.hidden[rows, :width]
        return Batch(trajectories, tokens, features, hidden, positions, self.kept)


@dataclass(frozen=True)
class RankSlice:
    """The answers of a step that one rank trains, split into micro-batches."""

    indices: list[int]  # of the answers among all trajectories
    batch: Batch  # these answers, in this order
    micro_batches: list[slice]  # rows of the batch
    rows: list[int]  # their rows in the whole step
    step_rows: int  # R answers in the whole step
    step_tokens: torch.Tensor  # tokens that a reduced head must hold: those of all R answers, any shape
    ranks: Ranks = ALONE

    @property
    def is_one_batch(self) -> bool:
        """Return whether the whole step is a single batch."""
        return len(self.micro_batches) == self.ranks.world == 1


def split_rows(batch: Batch, block_tokens: int, limit: int | None) -> list[slice]:
    """Split a batch into neighbouring rows of at most `limit` tokens, or of one row; None: all rows are one part.

    block_tokens: tokens of a row's blocks, which count in addition to its padded trajectory.
    """
    lengths = [len(t.tokens) for t in batch.trajectories]
    parts: list[slice] = []
    start, longest = 0, 0
    for row, length in enumerate(lengths):
        longest = max(longest, length)
        if limit is not None and row > start and (row + 1 - start) * (longest + block_tokens) > limit:
            parts.append(slice(start, row))
            start, longest = row, length
    return [*parts, slice(start, len(lengths))]


_Read = tuple[torch.Tensor, ...]  # features, and hidden states if they are needed


@dataclass
class _Reads:
    """The target's reads for a batch."""

    rows: dict[int, _Read] = field(default_factory=dict)  # trajectory -> its read
    kept: list[KeptGroup] = field(default_factory=list)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory of tensors that another stream made until this one is done with them."""
        tensors = [tensor for read in self.rows.values() for tensor in read]
        for _, encoded in self.kept:
            assert encoded.cache is not None
            tensors += [encoded.ids, encoded.hidden]
            tensors += [x for slots in encoded.cache.entries for x in (slots.keys, slots.values) if x is not None]
        for tensor in tensors:
            tensor.record_stream(stream)


class FeatureSource:
    """The target's features of a set of trajectories, by index."""

    def __init__(
        self,
        target: Target,
        layer_ids: Sequence[int],
        trajectories: Sequence[Trajectory],
        config: TrainingConfig,
        *,
        with_hidden: bool = True,
        tree_tokens: int = 0,
        ahead: bool | None = None,
    ):
        """Keep features if `config.feature_memory_mb` holds those of all trajectories.

        with_hidden: whether losses read the target's distribution; if not, its last layers are not run.
        tree_tokens: free cache entries for proposals that the target scores in a step; 0: it scores none. If it scores
        some, a batch keeps the keys and values of its trajectories, if `config.feature_memory_mb` holds them.
        ahead: whether `prefetch` does anything; by default on CUDA, where it takes no time from other work.
        """
        self.with_hidden = with_hidden
        self.target, self.layer_ids, self.trajectories = target, tuple(layer_ids), trajectories
        self._lengths = lengths = trajectory_lengths(trajectories)
        width = target.head_weight.shape[1] * (len(self.layer_ids) + with_hidden)
        self._memory, self._tree_tokens = config.feature_memory_mb * 2**20, tree_tokens
        self._keeps = int(lengths.sum()) * width * target.dtype.itemsize <= self._memory
        # a step needs an answer for the target's forward, which may run ahead, and for its batch
        self._answer = functools.lru_cache(2 * config.sequences_per_step)(trajectories.__getitem__)
        self._names = trajectory_ids(trajectories)
        self._tokens_per_group = config.tokens_per_target_forward
        self._groups = list(group_by_length(lengths, self._tokens_per_group)) if self._keeps else []
        self._group_of = {index: g for g, group in enumerate(self._groups) for index in group}
        self._cache: dict[int, dict[int, _Read]] = {}
        on_cuda = target.device.type == "cuda"
        # never with a shared target: its messages and the gradients' would interleave in any order
        self._reads_ahead = not self._keeps and target.sharing == 1 and (on_cuda if ahead is None else ahead)
        self._stream = torch.cuda.Stream(target.device) if self._reads_ahead and on_cuda else None
        self._ahead: tuple[tuple[int, ...], _Reads] | None = None

    def own_rows(self, indices: Sequence[int], ranks: Ranks) -> list[int]:
        """Return the rows of a step's trajectories that this rank trains."""
        return ranks.assigned_rows(self._lengths[list(indices)].tolist())

    def shared(self, indices: Sequence[int], ranks: Ranks) -> list[int]:
        """Return the trajectories of a step that are trained by the ranks that share the target with this one."""
        lengths = self._lengths[list(indices)].tolist()
        rows = sorted(row for rank in ranks.target_group for row in ranks.assigned_rows(lengths, rank))
        return [indices[row] for row in rows]

    def prefetch(self, indices: Sequence[int]) -> None:
        """Start the reads of the next `batch`, on CUDA in a separate stream next to the queued kernels.

        Memory then holds the features of two batches.
        """
        if not self._reads_ahead:
            return
        stream: AbstractContextManager[object] = nullcontext()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.target.device))
            stream = torch.cuda.stream(self._stream)
        with stream:
            self._ahead = tuple(indices), self._read_all(indices)

    def batch(self, indices: Sequence[int], shared: Sequence[int] | None = None) -> Batch:
        """Return the trajectories at `indices` with their features.

        shared: these and the trajectories that other ranks read now with the same copy of the target; by default these.
        """
        trajectories = [self._answer(i) for i in indices]
        reads = self._prefetched(indices)
        if reads is None:
            reads = self._read_all(indices if shared is None else shared, needed=set(indices))
        features, *hidden = (
            torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
            for rows in zip(*(reads.rows[i] for i in indices), strict=True)
        )
        positions = torch.arange(features.shape[1], device=features.device).expand(len(indices), -1)
        tokens = pad_tokens(trajectories, features.device)
        return Batch(trajectories, tokens, features, hidden[0] if hidden else None, positions, reads.kept)

    def _prefetched(self, indices: Sequence[int]) -> _Reads | None:
        """Return the reads that were made ahead, if they are of these trajectories."""
        ahead, self._ahead = self._ahead, None
        if ahead is None or ahead[0] != tuple(indices):
            return None
        if self._stream is not None:
            current = torch.cuda.current_stream(self.target.device)
            current.wait_stream(self._stream)
            ahead[1].record_stream(current)
        return ahead[1]

    def _read_all(self, indices: Sequence[int], needed: Set[int] | None = None) -> _Reads:
        """Read these trajectories with the target; return those in `needed` (by default all)."""
        reads = _Reads()
        if self._keeps:
            for g in dict.fromkeys(self._group_of[i] for i in indices):
                if g not in self._cache:
                    self._cache[g] = self._read_group(self._groups[g], self._tokens_of(self._groups[g]))
                reads.rows |= self._cache[g]
            return reads
        unique = list(dict.fromkeys(indices))
        by_length = group_by_length(self._lengths[unique], self._tokens_per_group)
        groups = [[unique[i] for i in group] for group in by_length]
        tokens = [self._tokens_of(group) for group in groups]  # all first: a copy would wait for the forward before it
        kept = reads.kept if self._keeps_keys(unique) else None
        for group, ids in zip(groups, tokens, strict=True):
            read = self._read_group(group, ids, kept)
            reads.rows |= read if needed is None else {i: read[i] for i in group if i in needed}
        return reads

    def _keeps_keys(self, indices: Sequence[int]) -> bool:
        """Return whether the keys and values of these trajectories are kept for scoring.

        States of recurrent layers are of no use there: scoring stops at every rejection.
        """
        if not self._tree_tokens or self.target.layers.recurrent:
            return False
        token_bytes = ModelSize.from_config(self.target.config, 0).kv_bytes_per_token(self.target.dtype.itemsize)
        return int(self._lengths[list(indices)].sum()) * token_bytes / self.target.sharing <= self._memory

    def _tokens_of(self, members: Sequence[int]) -> torch.Tensor:
        return pad_tokens([self._answer(i) for i in members], self.target.device)

    def _read_group(
        self, members: Sequence[int], ids: torch.Tensor, kept: list[KeptGroup] | None = None
    ) -> dict[int, _Read]:
        """Read trajectories in one forward. ids: their tokens [n, T]. kept: takes the forward with its cache."""
        with torch.autocast(self.target.device.type, enabled=False):  # the training loop's is only for the drafter
            read = self._read(ids) if kept is None else self._read_with_keys(members, ids, kept)
        lengths = self._lengths[list(members)].tolist()
        return {
            i: tuple(tensor[row, :n].clone() for tensor in read)
            for row, (i, n) in enumerate(zip(members, lengths, strict=True))
        }

    def _read(self, ids: torch.Tensor) -> _Read:
        if not self.with_hidden:
            return (self.target.features(ids, self.layer_ids),)
        out = self.target.read(ids, self.layer_ids)
        assert out.features is not None
        return out.features, out.hidden

    def _read_with_keys(self, members: Sequence[int], ids: torch.Tensor, kept: list[KeptGroup]) -> _Read:
        encoded = encode_group(self.target, ids, self.layer_ids, self._tree_tokens)
        assert encoded.features is not None
        kept.append(([self._names[i].as_py() for i in members], replace(encoded, features=None)))
        return (encoded.features, encoded.hidden) if self.with_hidden else (encoded.features,)


def trajectories_of_step(count: int, per_step: int, step: int, seed: int) -> list[int]:
    """Return the indices that step `step` trains on: seeded permutations of `count`, one epoch after the other."""
    indices = []
    for number in range(step * per_step, (step + 1) * per_step):
        epoch, position = divmod(number, count)
        indices.append(int(_permutation(count, seed, epoch)[position]))
    return indices


@functools.lru_cache(maxsize=2)  # a step may span the end of an epoch
def _permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count)


def step_rng(seed: int, step: int) -> np.random.Generator:
    """Return the random numbers of one step: the same whether or not training was interrupted before it."""
    return np.random.default_rng([seed, 1, step])


def token_counts(trajectories: Sequence[Trajectory], vocab_size: int) -> torch.Tensor:
    """Count how often each token [V] occurs in the answers."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for tokens in answer_tokens(trajectories):
        counts += np.bincount(tokens, minlength=vocab_size)
    return torch.from_numpy(counts)


def frequent_tokens(counts: torch.Tensor, before: torch.Tensor | None = None) -> torch.Tensor:
    """Return all token ids [V], most frequent first; ties by id, or in their order in `before` [V]."""
    if before is None:
        return counts.argsort(descending=True, stable=True)
    return before[counts[before].argsort(descending=True, stable=True)]
