"""A drafter of one layer that drafts token by token: what EAGLE-3 and a target's native head share.

The layer's entry at position i is made of the token at i + 1 and a feature of position i: the target's for verified
positions, the layer's own output for proposals. Its output predicts the token at i + 2.

There is one layer, so keys and values of an entry depend only on its token and feature: entries of the verified
prefix need no attention, all anchors share them, and the input of a block depends only on the trajectory. Unrolling a
chain on the trajectory's tokens is EAGLE-3's training-time test; on its own proposals it is drafting.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from draftsmith.stages.drafters.base import BlockSampler, Context, Drafter, argmax_tokens
from draftsmith.stages.drafters.block_attention import ContextMask, block_attention
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.targets.kv_cache import KeyValueSlots, Rows


@dataclass
class PrefixContext(Context):
    """Entries and features of the verified prefix: position i at index i."""

    keys: torch.Tensor  # [B, kv_heads, T, head_dim], rotated; entry i is final once the token at i + 1 is
    values: torch.Tensor  # [B, kv_heads, T, head_dim]
    features: torch.Tensor  # [B, T, H], after `fuse`


class PrefixSlots(Context):
    """The context while decoding: one row per request, position p at index p + 1.

    Index 0 holds the unused entry before the first position, so that a prompt needs no special case.
    """

    def __init__(self, rows: int, capacity: int):
        self.entries = KeyValueSlots(rows, capacity + 1)
        self.rows, self.capacity = rows, capacity
        self.features: torch.Tensor | None = None  # [rows, capacity + 1, H], allocated with the first features


class Chain(BlockSampler):
    """Unrolls A chains per row: each call takes the next token of every chain."""

    def __init__(self, drafter: ChainDrafter, context: PrefixContext, anchors: torch.Tensor, head: Head | None = None):
        self.drafter, self.context = drafter, context
        if head is not None:  # None: the caller needs only hidden states
            self.head = head
        self.positions = (anchors - 1).clamp(min=0)  # position of the entry that holds the anchor's token
        self.features = context.features.gather(
            1, self.positions[..., None].expand(-1, -1, context.features.shape[-1])
        )  # [B, A, H]
        self.context_mask = ContextMask(self.positions)
        self._keys: list[torch.Tensor] = []  # each [B, kv_heads, A, D]
        self._values: list[torch.Tensor] = []

    def attend(self, queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """Add an entry to every chain; return the attention [B, A, q] of its query over the prefix and the chain.

        queries: [B, heads, A, D]; keys, values: [B, kv_heads, A, D].
        """
        self._keys, self._values = [*self._keys, keys], [*self._values, values]
        entries = torch.stack(self._keys, 3), torch.stack(self._values, 3)
        prefix = self.context.keys, self.context.values
        attended = block_attention(queries[..., None, :], prefix, entries, self.context_mask)
        return attended[:, :, 0]  # one query per chain

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return hidden states [B, A, H] that predict the token after each of `tokens` [B, A]."""
        hidden, self.features = self.drafter.advance(self, tokens, self.positions + len(self._keys))
        return hidden

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head.logits(self.step(tokens))


class ChainDrafter(Drafter):
    """The contexts and chains of a drafter of one layer. A kind gives its features, its entries and a step."""

    autoregressive = True
    norm: Any  # before the head
    _embedding: tuple[torch.Tensor]  # [V, H], in a tuple: neither a parameter nor a buffer of this module

    @abstractmethod
    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        """Return the features [..., H] of entries from the target's [..., K*H]."""

    @abstractmethod
    def entries(
        self, following: torch.Tensor, features: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rotated keys and values [B, kv_heads, N, D] of entries at positions [B, N].

        following: [B, N] tokens at the positions after them. features: [B, N, H].
        """

    @abstractmethod
    def advance(self, chain: Chain, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states [B, A, H] that predict, and the features [B, A, H] of the chains' next entries.

        tokens: [B, A] of the entries at positions [B, A], which attend by `chain.attend`.
        """

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the embeddings [..., H] of tokens [...]."""
        embedded: torch.Tensor = F.embedding(tokens, self._embedding[0])
        return embedded.to(self.norm.weight.dtype)

    def encode(self, features: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> PrefixContext:
        fused = self.fuse(features)
        # The last entry's token is not known yet; the block of the following anchor computes that entry itself.
        following = torch.cat([tokens[:, 1:], tokens[:, -1:]], 1)
        return PrefixContext(*self.entries(following, fused, positions), fused)

    def block_hidden(self, context: Context, tokens: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        assert isinstance(context, PrefixContext)
        chain = Chain(self, context, anchors)
        return torch.stack([chain.step(tokens[..., k]) for k in range(tokens.shape[-1])], 2)

    def block_sampler(
        self,
        context: Context,
        anchor_tokens: torch.Tensor,  # noqa: ARG002
        anchors: torch.Tensor,
        block_size: int,  # noqa: ARG002
        head: Head,
    ) -> BlockSampler:
        assert isinstance(context, PrefixContext)
        return Chain(self, context, anchors, head)

    @torch.no_grad()
    def propose(
        self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor, block_size: int, head: Head
    ) -> torch.Tensor:
        assert isinstance(context, PrefixContext)
        chain = Chain(self, context, anchors)
        tokens = [anchor_tokens]
        for _ in range(block_size - 1):
            tokens.append(argmax_tokens(chain.step(tokens[-1]), head))
        return torch.stack(tokens[1:], -1)

    def new_context(self, rows: int, capacity: int) -> PrefixSlots:
        return PrefixSlots(rows, capacity)

    def extend(
        self,
        context: Context,
        rows: Rows,
        features: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        lengths: torch.Tensor | None = None,  # noqa: ARG002
    ) -> None:
        """Add features. The first token completes the entry before it, which held a proposal or nothing until now."""
        assert isinstance(context, PrefixSlots)
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=positions.device)
        row_index = rows[:, None]
        fused = self.fuse(features)
        if context.features is None:
            context.features = fused.new_zeros(context.rows, context.capacity + 1, fused.shape[-1])
        before = context.features[row_index, positions[:, :1]]  # index p holds position p - 1
        context.features[row_index, positions + 1] = fused
        keys, values = self.entries(tokens, torch.cat([before, fused[:, :-1]], 1), (positions - 1).clamp(min=0))
        context.entries.write(row_index, positions, keys.transpose(1, 2), values.transpose(1, 2))

    def select(self, context: Context, rows: Rows, length: int) -> PrefixContext:
        if isinstance(context, PrefixContext):
            keys, values = (entries[rows, :, :length] for entries in (context.keys, context.values))
            return PrefixContext(keys, values, context.features[rows, :length])
        assert isinstance(context, PrefixSlots) and context.features is not None
        keys, values = (entries[:, :, 1:] for entries in context.entries.read(rows, length + 1))
        return PrefixContext(keys, values, context.features[rows, 1 : length + 1])

    def move_row(self, context: Context, source: int, to: int) -> None:
        assert isinstance(context, PrefixSlots)
        context.entries.move_row(source, to)
        if context.features is not None:
            context.features[to] = context.features[source]
