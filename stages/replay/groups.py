"""Groups of trajectories of similar length, which the target reads in one forward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from draftsmith.stages.data.trajectories import Trajectory, group_by_length, pad_tokens, trajectory_lengths
from draftsmith.stages.replay.options import TREE_TOKENS
from draftsmith.stages.runtime.stage import WHOLE, Shard
from draftsmith.stages.targets.causal_lm import Target
from draftsmith.stages.targets.kv_cache import SlotCache


@dataclass(frozen=True)
class Group:
    """B trajectories of similar length, padded on the right to T tokens."""

    trajectories: Sequence[Trajectory]
    ids: torch.Tensor  # [B, T]

    @classmethod
    def padded(cls, trajectories: Sequence[Trajectory], device: torch.device) -> Group:
        return cls(trajectories, pad_tokens(trajectories, device))

    @property
    def positions(self) -> torch.Tensor:
        """Return the position of every token, [B, T]."""
        return torch.arange(self.ids.shape[1], device=self.ids.device).expand(len(self.ids), -1)


def group_indices(
    trajectories: Sequence[Trajectory], tokens_per_group: int, shard: Shard = WHOLE
) -> Iterator[list[int]]:
    """Yield the indices of groups of at most `tokens_per_group` tokens with padding (or of one trajectory).

    The groups depend only on the lengths and are the same for any number of shards, because the last bits of a
    result may depend on its group's shape. shard: the one whose groups are yielded.
    """
    for number, indices in enumerate(group_by_length(trajectory_lengths(trajectories), tokens_per_group)):
        if shard.contains(number):
            yield indices


def count_in(trajectories: Sequence[Trajectory], tokens_per_group: int, shard: Shard) -> int:
    """Count the trajectories in the groups of a shard."""
    return sum(map(len, group_indices(trajectories, tokens_per_group, shard)))


@dataclass(frozen=True)
class EncodedGroup:
    """A forward of the target over B trajectories, padded to T tokens."""

    ids: torch.Tensor  # [B, T]
    hidden: torch.Tensor  # [B, T, H]
    features: torch.Tensor | None = None  # [B, T, K*H] of the requested layers
    cache: SlotCache | None = None  # the forward's, rows 0 … B-1
    tree_tokens: int = TREE_TOKENS  # free entries of each row of the cache, from T on


KeptGroup: TypeAlias = tuple[Sequence[str], EncodedGroup]  # trajectory names of a forward that kept its cache


def tree_tokens_of(block_size: int) -> int:
    """Return the free entries of a cache for the scoring of proposals."""
    return max(TREE_TOKENS, block_size)


def encode_group(
    target: Target, ids: torch.Tensor, layer_ids: Sequence[int] = (), tree_tokens: int = 0
) -> EncodedGroup:
    """Run the target over a group of trajectories, padded to tokens [B, T].

    layer_ids: the layers of the features.
    tree_tokens: free cache entries after each trajectory; 0: no cache is kept.
    """
    if not tree_tokens:
        out = target.read(ids, layer_ids)
        return EncodedGroup(ids, out.hidden, out.features)
    B, T = ids.shape
    cache = target.new_cache(B, T + tree_tokens)
    positions = torch.arange(T, device=ids.device).expand(B, -1)
    out = target.step(ids, positions, cache, slice(0, B), layer_ids=layer_ids)
    return EncodedGroup(ids, out.hidden, out.features, cache, tree_tokens)
