"""The interface of a drafter, which engines, replay and training use for every architecture."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.sampling import argmax, probability_of
from draftsmith.stages.drafters.spec import StepShape, TrainingRecipe
from draftsmith.stages.runtime.facts import Facts
from draftsmith.stages.targets.info import IDENTITY, LogitMap, TargetInfo
from draftsmith.stages.targets.kv_cache import Rows
from draftsmith.stages.targets.packed_linear import packed_copy

if TYPE_CHECKING:
    from draftsmith.stages.targets.causal_lm import Target

LOGITS_PER_CHUNK = 2**26  # 256 MB in float32


@dataclass(frozen=True)
class DrafterInfo:
    """The origin of a drafter, written next to its weights as `drafter.json`."""

    target_digest: str = ""
    target_source: str = ""
    parents: tuple[str, ...] = ()  # content ids of the artifacts that it was trained from
    training: dict[str, Any] = field(default_factory=dict)  # stage, steps, trained positions
    # How a target with another digest differs; empty in older records.
    target_dtype: str = ""
    target_revision: str = ""  # the hub's commit
    tokenizer_digest: str = ""

    def made_for(self, target: TargetInfo) -> DrafterInfo:
        """Return the record with this target."""
        return replace(
            self,
            target_digest=target.digest,
            target_source=target.source,
            target_dtype=target.dtype,
            target_revision=target.revision or "",
            tokenizer_digest=target.tokenizer_digest,
        )


class Context:
    """A drafter's state of the verified prefix. Readers mask the positions that are not before an anchor."""


class BlockSampler(ABC):
    """Samples blocks after [B, A] anchors. Every call advances by one offset; a shallow copy advances independently.

    The softmax of the logits, at a temperature, is the distribution q that a proposal is sampled from and verified
    with.
    """

    head: Head

    @abstractmethod
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the float32 logits [B, A, V'] of the next offset over the head's tokens, -inf for impossible ones.

        tokens: [B, A] at the previous offset; for the first offset, the anchors' tokens.
        """

    def probability(self, tokens: torch.Tensor, following: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return float64 [B, A]: q of the tokens `following` [B, A] at the next offset, 0 for -1.

        Advances by one offset, as `logits` does. tokens: as in `logits`.
        """
        columns, present = self.head.to_columns(following.clamp(min=0))
        return probability_of(self.logits(tokens), columns, temperature) * (present & (following >= 0))


class ParallelSampler(BlockSampler):
    """Samples from a drafter whose offsets do not depend on each other's tokens: one forward computed them all."""

    def __init__(self, hidden: torch.Tensor, head: Head):
        """Start before the first offset. hidden: [B, A, K, H] from `block_hidden`."""
        self._hidden, self.head, self._drafted = hidden, head, 0

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        self._drafted += 1
        return self.head.logits(self._hidden[:, :, self._drafted - 1])


class Drafter(Facts, nn.Module, ABC):
    """The draft model `q`. The target's embedding and head are frozen, shared and never saved with it."""

    config: Any  # a transformers config
    block_size: int  # anchor + proposals, as trained
    target_layer_ids: Sequence[int]  # layer k = hidden state AFTER target layer k
    frequent_tokens: torch.Tensor | None = None  # [V] token ids, most frequent first in the training data
    info = DrafterInfo()
    folder: Path | None = None  # the checkpoint that it was loaded from
    adapter_rank: int | None = None  # rank of the adapter that is trained instead of the weights
    logit_map: LogitMap = IDENTITY  # the target's logit map, for heads made from the target's head
    embedding_scale: float = 1.0  # the target's factor on the embeddings that its first layer reads
    kind: ClassVar[str]  # this and `recipe` come from its `Traits`
    autoregressive: ClassVar[bool]  # hidden states of an offset depend on the tokens at earlier offsets
    has_own_head: ClassVar[bool]  # the head over the draft vocabulary is trained with the drafter
    has_selector: ClassVar[bool] = False  # the token before a proposal selects it among the head's best
    corrects_head: ClassVar[bool] = False  # adds trained terms to the target's head
    samples_proposals: ClassVar[bool] = False  # for sampled requests, from q; verification reads q too
    float32_weights: ClassVar[tuple[str, ...]] = ()  # name prefixes; engines compute these in float32
    recipe: ClassVar[TrainingRecipe]
    layer_names: ClassVar[tuple[str, ...]]  # children whose linear maps read hidden states of the context or a block

    def _facts(self) -> Mapping[str, object]:
        weight, trained = next(self.parameters()), self.info.training
        return {
            "kind": self.kind,
            "layers": self.config.num_hidden_layers,
            "block size": self.block_size,
            "parameters": f"{sum(parameter.numel() for parameter in self.parameters()) / 1e6:,.1f}M",
            **({"target": self.info.target_source} if self.info.target_source else {}),
            **({"trained": f"{trained['steps']} steps of {trained['stage']}"} if trained.get("steps") else {}),
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": weight.device,
            **({"folder": self.folder} if self.folder else {}),
        }

    @abstractmethod
    def encode(self, features: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> Context:
        """Encode target features [B, T, K*H] of tokens [B, T] at positions 0 … T-1 as a context for `block_hidden`.

        Differentiable. The part that an anchor's block reads depends only on the tokens up to the anchor.
        """

    @abstractmethod
    def block_hidden(self, context: Context, tokens: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Return the hidden states [B, A, K, H] that predict offsets 1 … K after each anchor. Differentiable.

        A row's blocks see the target's features before their anchor, and themselves, never each other.
        tokens: [B, A, K], the anchor's token and those at offsets 1 … K-1 (read by an autoregressive drafter only).
        anchors: [B, A] absolute positions.
        """

    @abstractmethod
    def new_context(self, rows: int, capacity: int) -> Context:
        """Return an empty context for decoding, with one row per request."""

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

        Replaces entries at positions that were added before. Every row starts at most one after its last committed
        position.
        lengths: [n] columns before each row's padding. None: there is no padding, or it is shorter than a block.
        """

    @abstractmethod
    def select(self, context: Context, rows: Rows, length: int) -> Context:
        """Return the first `length` positions of these rows, for `block_hidden`; a slice of rows is not copied.

        Takes either kind of context: from `encode` (replay drops finished rows) or from `new_context` (decoding).
        """

    @abstractmethod
    def move_row(self, context: Context, source: int, to: int) -> None:
        """Copy one request's context into another row."""

    @abstractmethod
    def head_over(self, target_head: torch.Tensor, token_ids: torch.Tensor | None) -> Head:
        """Return the head over these token ids (None: all that the drafter can propose). target_head: [V, H]."""

    def linear_maps(self) -> dict[str, nn.Linear]:
        """Return the linear maps that read hidden states of the context or a block, by name."""
        maps = {name: module for name, module in self.named_modules() if isinstance(module, nn.Linear)}
        return {name: linear for name, linear in maps.items() if name.partition(".")[0] in self.layer_names}

    @property
    def map_sizes(self) -> tuple[int, int]:
        """Return the number of weights of the linear maps, and of their inputs and outputs together."""
        maps = self.linear_maps().values()
        weights = sum(linear.weight.numel() for linear in maps)
        return weights, sum(linear.in_features + linear.out_features for linear in maps)

    def drafting_head(self, target_head: torch.Tensor, head_tokens: int | None) -> Head:
        """Return the head to draft with: over all tokens, or the `head_tokens` most frequent in the training data."""
        if head_tokens is None or self.frequent_tokens is None:
            return self.head_over(target_head, None)
        return self.head_over(target_head, self.frequent_tokens[:head_tokens])

    def for_decoding(self) -> Drafter:
        """Return a copy with packed weights (`targets/packed_linear.py`) where possible. It cannot be trained."""
        return packed_copy(self, self.layer_names, (("k_proj", "v_proj"), ("gate_proj", "up_proj")))

    @property
    def has_confidence(self) -> bool:
        """Return whether it predicts the probability that its proposals are accepted."""
        return False

    def confidence(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return logits [...] of the probability that a proposal is accepted, given that those before it are.

        hidden: [..., H] states that the proposal is made from. Only for a drafter with `has_confidence`.
        """
        raise NotImplementedError

    @abstractmethod
    def operations(self, shape: StepShape, *, training: bool = True) -> float:
        """Return the floating-point operations of a forward's matrix products; `training` adds its backward's."""

    def block_sampler(
        self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor, block_size: int, head: Head
    ) -> BlockSampler:
        """Begin a block after each anchor, to be sampled offset by offset. anchor_tokens, anchors: [B, A].

        This implementation is for offsets that one forward computes. A drafter with `samples_proposals` overrides it.
        """
        tokens = anchor_tokens[..., None].expand(-1, -1, block_size - 1)
        return ParallelSampler(self.block_hidden(context, tokens, anchors), head)

    @abstractmethod
    def propose(
        self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor, block_size: int, head: Head
    ) -> torch.Tensor:
        """Draft one block after each anchor, greedily and without gradient. Returns token ids [B, A, block_size-1].

        anchor_tokens, anchors: [B, A].
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
class PreparedDrafter:
    """A drafter with the head and the block size that it drafts with."""

    drafter: Drafter
    head: Head
    block_size: int

    @classmethod
    def packed(cls, drafter: Drafter, target: Target, head_tokens: int | None, block_size: int) -> PreparedDrafter:
        """Return a drafter with packed weights where possible. head_tokens: as in `Drafter.drafting_head`."""
        head = drafter.drafting_head(target.head_weight, head_tokens).for_decoding(target)
        return cls(drafter.for_decoding(), head, block_size)

    def propose(self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Draft blocks greedily, as `Drafter.propose` does. Returns token ids [B, A, block_size-1]."""
        return self.drafter.propose(context, anchor_tokens, anchors, self.block_size, self.head)

    def sampler(self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor) -> BlockSampler:
        """Begin to sample blocks, as `Drafter.block_sampler` does."""
        return self.drafter.block_sampler(context, anchor_tokens, anchors, self.block_size, self.head)


def as_input(features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cast the target's features to `dtype`; under autocast return them as they are, without a copy."""
    return features if torch.is_autocast_enabled(features.device.type) else features.to(dtype)


def argmax_tokens(hidden: torch.Tensor, head: Head) -> torch.Tensor:
    """Return the argmax of the head's logits at hidden states [..., H] as token ids [...].

    At most `LOGITS_PER_CHUNK` logits are in memory at a time.
    """
    count = max(1, LOGITS_PER_CHUNK // head.weight.shape[0])
    chunks = [argmax_of_products(head.raw_logits(chunk), head) for chunk in hidden.flatten(0, -2).split(count)]
    return torch.cat(chunks).view(hidden.shape[:-1])


def argmax_of_products(raw: torch.Tensor, head: Head) -> torch.Tensor:
    """Return the token ids [...] with the largest of the head's products [..., V']."""
    return head.to_tokens(argmax(raw))


def propose_in_chunks(
    propose: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    hidden: torch.Tensor,
    anchor_tokens: torch.Tensor,
    numbers: int,
) -> torch.Tensor:
    """Return the proposals [B, A, K] for hidden states [B, A, K, H] after tokens [B, A], a few blocks at a time.

    propose: takes the states [1, n, K, H] and tokens [1, n] of n blocks.
    numbers: floats that `propose` allocates per block; n blocks allocate at most `LOGITS_PER_CHUNK`.
    """
    B, A, count = *anchor_tokens.shape, max(1, LOGITS_PER_CHUNK // numbers)
    blocks = (x.flatten(0, 1)[None].split(count, 1) for x in (hidden, anchor_tokens))
    return torch.cat([propose(*chunk) for chunk in zip(*blocks, strict=True)], 1).view(B, A, -1)
