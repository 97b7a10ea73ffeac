"""The target's head, over all tokens or over a part of the vocabulary: less work if most tokens never occur."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

import torch
from torch.nn import functional as F

from draftsmith.stages.targets.info import IDENTITY, LogitMap
from draftsmith.stages.targets.packed_linear import PackedLinear, can_pack

if TYPE_CHECKING:
    from draftsmith.stages.targets.causal_lm import Target


def flat_linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Multiply x [..., H] by weight [V, H], as one matrix product.

    A view with more dimensions that is not contiguous would become a batched product that copies the whole weight.
    """
    return F.linear(x.reshape(-1, x.shape[-1]), weight).unflatten(0, x.shape[:-1])


@dataclass(frozen=True)
class Head:
    """A frozen head over V' tokens."""

    weight: torch.Tensor  # [V', H]
    token_ids: torch.Tensor | None = None  # [V'] sorted ids of the target's vocabulary; None: all of it
    logit_map: LogitMap = IDENTITY  # from products with `weight` to logits
    product: Callable[[torch.Tensor], torch.Tensor] | None = None  # multiplies by packed weights, without gradient

    @classmethod
    def over(cls, weight: torch.Tensor, token_ids: torch.Tensor | None, logit_map: LogitMap = IDENTITY) -> Head:
        """Return the head of rows `token_ids` of the full head `weight` [V, H]."""
        if token_ids is None:
            return cls(weight, None, logit_map)
        ids = token_ids.unique().to(weight.device)
        if ids.numel() == weight.shape[0]:
            return cls(weight, None, logit_map)
        return cls(weight[ids].contiguous(), ids, logit_map)

    def with_temperature(self, temperature: float) -> Self:
        """Return the head whose logits have the distribution sampled at this temperature, above 0, as their softmax."""
        return self if temperature == 1.0 else replace(self, logit_map=self.logit_map.with_temperature(temperature))

    def for_decoding(self, target: Target) -> Self:
        """Return the head over packed weights (`targets/packed_linear.py`) where they can be packed."""
        if not can_pack(self.weight):
            return self
        is_target_head = self.weight is target.head_weight
        return replace(self, product=target.head if is_target_head else PackedLinear(self.weight))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the float32 logits [..., V'] of hidden states [..., H]."""
        return self.logit_map(self.raw_logits(hidden).float())

    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the products [..., V'] that the logits are computed from, in the weight's dtype.

        They rank the tokens as the logits do.
        """
        hidden = hidden.to(self.weight.dtype)
        return flat_linear(hidden, self.weight) if self.product is None else self.product(hidden)

    def to_tokens(self, index: torch.Tensor) -> torch.Tensor:
        """Return the token ids of columns of the logits."""
        return index if self.token_ids is None else self.token_ids[index]

    def to_columns(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns of token ids in the logits, and bool: whether the token is in this head.

        Columns of absent tokens are 0.
        """
        if self.token_ids is None:
            return tokens, torch.ones_like(tokens, dtype=torch.bool)
        columns = torch.searchsorted(self.token_ids, tokens).clamp(max=self.token_ids.numel() - 1)
        present = self.token_ids[columns] == tokens
        return torch.where(present, columns, 0), present
