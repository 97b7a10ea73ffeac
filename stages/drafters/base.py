"""The interface of a drafter: what engines, replay and training may ask of any architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from stages.drafters.head import Head
from stages.targets.slots import Rows


@dataclass(frozen=True)
class Proposals:
    """What a drafter proposes behind each anchor, offsets 1 … block_size-1."""

    tokens: torch.Tensor  # [B, A, block_size-1] token ids, the argmax at every offset
    logprobs: torch.Tensor | None  # [B, A, block_size-1] float32, under the drafter's own softmax over its head


@dataclass(frozen=True)
class DrafterInfo:
    """Where a drafter comes from: written beside its weights as `drafter.json`."""

    target_digest: str = ""
    target_source: str = ""
    parents: tuple[str, ...] = ()  # content ids of the artifacts that it was trained from
    training: dict[str, Any] = field(default_factory=dict)  # stage, steps, trained positions


class Context:
    """What a drafter knows of the verified prefix. Positions behind an anchor never see it: readers mask."""


class Drafter(nn.Module, ABC):
    """The draft model `q`. The target's embedding and head are frozen, shared and never saved with it."""

    block_size: int  # anchor + proposals, as trained
    target_layer_ids: Sequence[int]  # layer k = hidden state AFTER target layer k
    frequent_tokens: torch.Tensor | None  # [V] token ids, most frequent first in the training data
    info: DrafterInfo

    @abstractmethod
    def encode(self, features: torch.Tensor, positions: torch.Tensor) -> Context:
        """Target features [B, T, K*H] at positions [B, T] → context for `block_hidden`. Differentiable."""

    @abstractmethod
    def block_hidden(
        self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor, block_size: int
    ) -> torch.Tensor:
        """Hidden states that predict offsets 1 … block_size-1 behind each anchor. Differentiable.

        anchor_tokens, anchors: [B, A] committed token and its absolute position. A row's blocks see the context at
        positions < anchor, and themselves, never each other. Returns [B, A, block_size-1, H].
        """

    @abstractmethod
    def new_context(self, rows: int, capacity: int) -> Context:
        """An empty context for decoding, with one row a request."""

    @abstractmethod
    def extend(self, context: Context, rows: Rows, features: torch.Tensor, positions: torch.Tensor) -> None:
        """Add target features [n, T, K*H] at positions [n, T]; entries at positions seen before are replaced."""

    @abstractmethod
    def select(self, context: Context, rows: Rows, length: int) -> Context:
        """The first `length` positions of some rows, as `block_hidden` takes it; no copy for a slice of rows.

        Takes either kind of context: of `encode` (replay drops rows that are finished) or of `new_context` (decoding).
        """

    @abstractmethod
    def move_row(self, context: Context, source: int, to: int) -> None:
        """Copy one request's context into another row."""

    def drafting_head(self, head_weight: torch.Tensor, head_tokens: int | None) -> Head:
        """The head to draft with: all tokens, or the `head_tokens` most frequent ones of the training data."""
        if head_tokens is None or self.frequent_tokens is None:
            return Head(head_weight)
        return Head.over(head_weight, self.frequent_tokens[:head_tokens])

    @torch.no_grad()
    def propose(
        self,
        context: Context,
        anchor_tokens: torch.Tensor,
        anchors: torch.Tensor,
        block_size: int,
        head: Head,
        *,
        with_logprobs: bool = True,
    ) -> Proposals:
        """Draft one block behind each anchor; shapes as in `block_hidden`. Log-probs cost a pass over the logits."""
        hidden = self.block_hidden(context, anchor_tokens, anchors, block_size)
        best, columns = (logits := head.logits(hidden)).max(-1)
        return Proposals(head.to_tokens(columns), best - logits.logsumexp(-1) if with_logprobs else None)
