"""The interface of a drafter: what engines, replay and training may ask of any architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import nn

from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.sampling import argmax, probability_of
from draftsmith.stages.drafters.spec import TrainingRecipe
from draftsmith.stages.target.kv_cache import Rows
from draftsmith.stages.target.logit_map import PLAIN, LogitMap
from draftsmith.stages.target.packed_linear import packed_copy

LOGITS_AT_ONCE = 2**26  # 256 MB in float32


@dataclass(frozen=True)
class DrafterInfo:
    """Where a drafter comes from: written beside its weights as `drafter.json`."""

    target_digest: str = ""
    target_source: str = ""
    parents: tuple[str, ...] = ()  # content ids of the artifacts that it was trained from
    training: dict[str, Any] = field(default_factory=dict)  # stage, steps, trained positions


@dataclass(frozen=True)
class StepShape:
    """The sizes of one training step that its work depends on."""

    rows: int  # trajectories
    width: int  # positions that they are padded to
    anchors: torch.Tensor  # [rows, A] positions
    head_positions: int  # block positions with a loss
    head_rows: int  # tokens in the softmax
    prefixes: int = 1  # how often the trajectories are encoded; 0 where chains are drafted again on the same context

    @property
    def blocks(self) -> int:
        return self.anchors.numel()

    def seen_within(self, window: int | None) -> int:
        """Positions before the anchors, of all anchors together, that a layer with this window reads."""
        return int((self.anchors if window is None else self.anchors.clamp(max=window - 1)).sum())


class Context:
    """What a drafter knows of the verified prefix. Positions behind an anchor never see it: readers mask."""


class BlockSampler(ABC):
    """Blocks in the making behind [B, A] anchors. Every call goes one offset further; a shallow copy goes its own way.

    The softmax of the logits, at a temperature, is the distribution q that a proposal is sampled from and verified
    with.
    """

    head: Head

    @abstractmethod
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [B, A, V'] over the head's tokens, of the next offset; -inf for what cannot be proposed there.

        tokens: [B, A] at the offset before it, at first the anchors' own.
        """

    def probability(self, tokens: torch.Tensor, following: torch.Tensor, temperature: float) -> torch.Tensor:
        """float64 [B, A]: q of the tokens `following` [B, A] (-1: of none, 0) at the next offset; it goes further as
        `logits` does."""
        columns, present = self.head.to_columns(following.clamp(min=0))
        return probability_of(self.logits(tokens), columns, temperature) * (present & (following >= 0))


class ParallelSampler(BlockSampler):
    """Of a drafter whose offsets do not see each other's tokens: all were computed at once."""

    def __init__(self, hidden: torch.Tensor, head: Head):
        """hidden: [B, A, K, H], as `block_hidden` has it."""
        self._hidden, self.head, self._drafted = hidden, head, 0

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        self._drafted += 1
        return self.head.logits(self._hidden[:, :, self._drafted - 1])


class Drafter(nn.Module, ABC):
    """The draft model `q`. The target's embedding and head are frozen, shared and never saved with it."""

    block_size: int  # anchor + proposals, as trained
    target_layer_ids: Sequence[int]  # layer k = hidden state AFTER target layer k
    frequent_tokens: torch.Tensor | None  # [V] token ids, most frequent first in the training data
    info: DrafterInfo
    logit_map: LogitMap = PLAIN  # the target's, which holds for every head that is made of its own
    embedding_scale: float = 1.0  # the target's: of what its first layer reads
    kind: ClassVar[str]  # this and `recipe`: of its `Traits`
    autoregressive: ClassVar[bool]  # do the hidden states of an offset depend on the tokens at the offsets before it?
    has_own_head: ClassVar[bool]  # is the head over the draft vocabulary a part of the drafter, and trained with it?
    has_selector: ClassVar[bool] = False  # does the token before a proposal choose it among the head's best?
    corrects_head: ClassVar[bool] = False  # does it add trained terms of its own to the target's head?
    samples_proposals: ClassVar[bool] = False  # are a sampled request's proposals sampled from q, and verified with it?
    recipe: ClassVar[TrainingRecipe]
    layer_names: ClassVar[tuple[str, ...]]  # children whose linear maps read hidden states of the context or a block

    @abstractmethod
    def encode(self, features: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> Context:
        """Target features [B, T, K*H] of tokens [B, T] at positions 0 … T-1 → context for `block_hidden`.

        Differentiable. What an anchor's block reads of it depends on the tokens up to the anchor alone.
        """

    @abstractmethod
    def block_hidden(self, context: Context, tokens: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Hidden states that predict offsets 1 … K behind each anchor. Differentiable.

        tokens: [B, A, K], the anchor's token and those at offsets 1 … K-1 (read by an autoregressive drafter only);
        anchors: [B, A] absolute positions. A row's blocks see what the target knew before their anchor, and themselves,
        never each other. Returns [B, A, K, H].
        """

    @abstractmethod
    def new_context(self, rows: int, capacity: int) -> Context:
        """An empty context for decoding, with one row a request."""

    @abstractmethod
    def extend(
        self,
        context: Context,
        rows: Rows,
        features: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> None:
        """Add target features [n, T, K*H] of tokens [n, T] at consecutive positions [n, T].

        Entries at positions seen before are replaced. Every row starts at most one behind the last committed position.
        lengths: [n] columns in front of each row's padding; left out: all, or as many as a block has are no padding.
        """

    @abstractmethod
    def select(self, context: Context, rows: Rows, length: int) -> Context:
        """The first `length` positions of some rows, as `block_hidden` takes it; no copy for a slice of rows.

        Takes either kind of context: of `encode` (replay drops rows that are finished) or of `new_context` (decoding).
        """

    @abstractmethod
    def move_row(self, context: Context, source: int, to: int) -> None:
        """Copy one request's context into another row."""

    @abstractmethod
    def head_over(self, target_head: torch.Tensor, token_ids: torch.Tensor | None) -> Head:
        """The head over some token ids (None: all that the drafter can propose). target_head: [V, H], the target's."""

    def drafting_head(self, target_head: torch.Tensor, head_tokens: int | None) -> Head:
        """The head to draft with: all tokens, or the `head_tokens` most frequent ones of the training data."""
        if head_tokens is None or self.frequent_tokens is None:
            return self.head_over(target_head, None)
        return self.head_over(target_head, self.frequent_tokens[:head_tokens])

    def for_decoding(self) -> Drafter:
        """Return a copy with packed weights (`target/packed_linear.py`) where possible. It cannot be trained."""
        return packed_copy(self, self.layer_names, (("k_proj", "v_proj"), ("gate_proj", "up_proj")))

    @property
    def has_confidence(self) -> bool:
        """Does it say how probable it is that its proposals are kept?"""
        return False

    def confidence(self, hidden: torch.Tensor) -> torch.Tensor:
        """Logits [...] of the probability that the proposal is kept that hidden states [..., H] lead to, given that
        those before it are. Of a drafter that `has_confidence`."""
        raise NotImplementedError

    @abstractmethod
    def training_operations(self, shape: StepShape) -> float:
        """Floating-point operations of the matrix products of one step, forward and backward; formula at each."""

    def block_sampler(
        self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor, block_size: int, head: Head
    ) -> BlockSampler:
        """Begin a block behind each anchor, to be drafted offset by offset. anchor_tokens, anchors: [B, A].

        This implementation is for offsets that one forward computes. A drafter with `samples_proposals` overrides it.
        """
        tokens = anchor_tokens[..., None].expand(-1, -1, block_size - 1)
        return ParallelSampler(self.block_hidden(context, tokens, anchors), head)

    @abstractmethod
    def propose(
        self,
        context: Context,
        anchor_tokens: torch.Tensor,
        anchors: torch.Tensor,
        block_size: int,
        head: Head,
    ) -> torch.Tensor:
        """Draft one block behind each anchor, greedily and without gradient.

        anchor_tokens, anchors: [B, A]. Returns token ids [B, A, block_size-1].
        """

    def selector_candidates(self, hidden: torch.Tensor, head: Head) -> torch.Tensor:
        """Return the columns [..., k] of the head's tokens that the selector chooses among, at hidden [..., H].

        Without gradient. Only for a drafter with `has_selector`.
        """
        raise NotImplementedError

    def selector_logits(
        self, hidden: torch.Tensor, previous: torch.Tensor, columns: torch.Tensor, head: Head
    ) -> torch.Tensor:
        """Return the float32 logits [..., k] of tokens, by their columns [..., k], after `previous` [...].

        Differentiable. Their softmax over the candidates is q. Only for a drafter with `has_selector`.
        """
        raise NotImplementedError

    def selector_propose(self, hidden: torch.Tensor, anchor_tokens: torch.Tensor, head: Head) -> torch.Tensor:
        """Return proposals [B, A, K] from hidden states [B, A, K, H]. Only for a drafter with `has_selector`."""
        raise NotImplementedError


@dataclass(frozen=True)
class BlockDrafter:
    """A drafter with the head and the block size that it drafts with."""

    drafter: Drafter
    head: Head
    block_size: int

    def propose(self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Draft blocks greedily, as `Drafter.propose` does. Returns token ids [B, A, block_size-1]."""
        return self.drafter.propose(context, anchor_tokens, anchors, self.block_size, self.head)

    def sampler(self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor) -> BlockSampler:
        """Begin to sample blocks, as `Drafter.block_sampler` does."""
        return self.drafter.block_sampler(context, anchor_tokens, anchors, self.block_size, self.head)


def as_input(features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The target's features as a product in `dtype` takes them; autocast takes them as they are, without a copy."""
    return features if torch.is_autocast_enabled(features.device.type) else features.to(dtype)


def argmax_tokens(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Return the argmax of the head's logits at hidden states [..., H] as token ids.

    Logits are there for `LOGITS_AT_ONCE` at a time.
    """
    at_once = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    parts = [argmax_of_products(head.raw_logits(part), head) for part in hidden.flatten(0, -2).split(at_once)]
    return torch.cat(parts).view(hidden.shape[:-1])


def argmax_of_products(raw: torch.Tensor, head: Head) -> torch.Tensor:
    """raw: [..., V'] the head's products → token ids [...]."""
    return head.to_tokens(argmax(raw))


def propose_in_chunks(
    propose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    anchor_tokens: torch.Tensor,
    numbers: int,
) -> torch.Tensor:
    """Of hidden states [B, A, K, H] behind tokens [B, A], what `propose` makes of some blocks at a time, [1, n, K, H]
    and [1, n]: as many as have `LOGITS_AT_ONCE` numbers, so many each."""
    B, A, count = *anchor_tokens.shape, max(1, LOGITS_AT_ONCE // numbers)
    blocks = (x.flatten(0, 1)[None].split(count, 1) for x in (hidden, anchor_tokens))
    return torch.cat([propose(*of_blocks) for of_blocks in zip(*blocks, strict=True)], 1).view(B, A, -1)
