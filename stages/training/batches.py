"""Batches of trajectories with the target's features, recomputed where they are used and kept in memory while they fit.

Nothing of the size of a hidden state goes to disk. Features are computed in fixed groups of trajectories, so that their
bits depend neither on the order of training nor on whether it was interrupted. Where memory does not hold them all, a
group is one trajectory: a step that draws at random would read whole groups for one member each.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from draftsmith.stages.replay.trace import Trajectory, groups_by_length, pad_tokens
from draftsmith.stages.targets.causal_lm import Target


@dataclass(frozen=True)
class Batch:
    """B trajectories, padded on the right to T positions."""

    trajectories: list[Trajectory]
    tokens: torch.Tensor  # [B, T]
    features: torch.Tensor  # [B, T, K*H], the target's dtype
    hidden: torch.Tensor | None  # [B, T, H] after the target's final norm: predicts the next position
    positions: torch.Tensor  # [B, T]


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
    ):
        """tokens_per_group: read by the target in one forward, as long as memory_mb hold the features of all.

        with_hidden: for losses that ask for the target's distribution; without, its last layers are not run.
        """
        self.with_hidden = with_hidden
        self.target, self.layer_ids, self.trajectories = target, tuple(layer_ids), list(trajectories)
        lengths = [len(t.tokens) for t in trajectories]
        self._bytes, self._limit = 0, memory_mb * 2**20
        width = target.head_weight.shape[1] * (len(self.layer_ids) + with_hidden)
        all_fit = sum(lengths) * width * target.dtype.itemsize <= self._limit
        self._groups = (
            list(groups_by_length(lengths, tokens_per_group)) if all_fit else [[i] for i in range(len(lengths))]
        )
        self._group_of = {index: g for g, group in enumerate(self._groups) for index in group}
        self._cache: OrderedDict[int, dict[int, _Read]] = OrderedDict()

    def _group(self, g: int) -> dict[int, _Read]:
        if g in self._cache:
            self._cache.move_to_end(g)
            return self._cache[g]
        members = self._groups[g]
        trajectories = [self.trajectories[i] for i in members]
        with torch.autocast(self.target.device.type, enabled=False):  # the training loop's is for the drafter alone
            read = self._read(pad_tokens(trajectories, self.target.device))
        entry = {}
        for row, (i, trajectory) in enumerate(zip(members, trajectories, strict=True)):
            n = len(trajectory.tokens)
            entry[i] = tuple(part[row, :n].clone() for part in read)
        self._cache[g] = entry
        self._bytes += _size(entry)
        while self._bytes > self._limit and len(self._cache) > 1:
            _, dropped = self._cache.popitem(last=False)
            self._bytes -= _size(dropped)
        return entry

    def _read(self, ids: torch.Tensor) -> _Read:
        if not self.with_hidden:
            return (self.target.features(ids, self.layer_ids),)
        out = self.target.read(ids, self.layer_ids)
        assert out.features is not None
        return out.features, out.hidden

    def batch(self, indices: Sequence[int]) -> Batch:
        """The trajectories at `indices`, with their features."""
        trajectories = [self.trajectories[i] for i in indices]
        parts = [self._group(self._group_of[i])[i] for i in indices]
        features, *hidden = (
            torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True) for rows in zip(*parts, strict=True)
        )
        positions = torch.arange(features.shape[1], device=features.device).expand(len(indices), -1)
        tokens = pad_tokens(trajectories, features.device)
        return Batch(trajectories, tokens, features, hidden[0] if hidden else None, positions)


def _size(entry: dict[int, _Read]) -> int:
    return sum(tensor.nbytes for parts in entry.values() for tensor in parts)


def trajectories_of_step(count: int, per_step: int, step: int, seed: int) -> list[int]:
    """Which trajectories step `step` trains on: epochs of seeded permutations, cut without gaps. Stateless."""
    indices = []
    for drawn in range(step * per_step, (step + 1) * per_step):
        epoch, place = divmod(drawn, count)
        indices.append(int(np.random.default_rng([seed, epoch]).permutation(count)[place]))
    return indices


def step_rng(seed: int, step: int) -> np.random.Generator:
    """The random numbers of one step: the same whether or not training was interrupted before it."""
    return np.random.default_rng([seed, 1, step])


def token_counts(trajectories: Sequence[Trajectory], vocab_size: int) -> torch.Tensor:
    """How often each token [V] occurs in the responses."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for trajectory in trajectories:
        np.add.at(counts, trajectory.tokens[trajectory.prompt_length :], 1)
    return torch.from_numpy(counts)


def frequent_tokens(counts: torch.Tensor) -> torch.Tensor:
    """All token ids [V], most frequent first, ties by id."""
    return counts.argsort(descending=True, stable=True)
