"""The DSpark draft model: one backbone forward drafts a block, and its offsets then read the proposals before them.

Source: arXiv 2607.05147, and SGLang 0.5.23 (srt/models/dspark.py, srt/speculative/dspark_components). The backbone is
DFlash's. The logits of an offset are the target's head on its hidden state plus a low-rank bias from the token before
it (`MarkovHead`), so a block is sampled offset by offset, and each offset has its own q. A linear head predicts, from
hidden state and token or from the state alone, the probability that the proposal is accepted, given that those
before it are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

from draftsmith.stages.drafters.base import (
    LOGITS_PER_CHUNK,
    BlockSampler,
    Context,
    argmax_of_products,
    propose_in_chunks,
)
from draftsmith.stages.drafters.dflash.model import DFlashDrafter
from draftsmith.stages.drafters.dspark.config import TRAITS
from draftsmith.stages.drafters.lm_head import Head, flat_linear
from draftsmith.stages.drafters.spec import StepShape


class MarkovHead(nn.Module):
    """A head that reads the token before an offset and biases the offset's logits by `W2 e`, of low rank.

    e is the token's row of W1. Source: SGLang 0.5.20 (srt/models/dspark.py), whose names are `markov_w1` and
    `markov_w2`; there this is the head `vanilla`.
    """

    def __init__(self, vocabulary: int, rank: int):
        super().__init__()
        self.markov_w1 = nn.Embedding(vocabulary, rank)
        self.markov_w2 = nn.Linear(rank, vocabulary, bias=False)

    @property
    def rank(self) -> int:
        return self.markov_w1.embedding_dim

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Start without a bias: only W2 is zero, so it has a gradient."""
        nn.init.normal_(self.markov_w1.weight, std=self.rank**-0.5, generator=generator)
        nn.init.zeros_(self.markov_w2.weight)

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return e [..., r] of the tokens [...] before offsets."""
        return F.embedding(tokens, self.markov_w1.weight)


@dataclass(frozen=True)
class BiasedHead(Head):
    """The target's head over hidden states, plus `bias` [V, r] over e of the token before them (`MarkovHead`).

    Its products are the logits, whatever scale or soft cap the target's logits have: SGLang samples from their softmax
    (srt/models/dspark.py, `compute_base_logits`), and losses compare it with the target's distribution.
    It takes both concatenated, [..., H + r]. The bias is over all tokens: its rows are read at every use, so that
    several graphs with separate gradients can share one head.
    """

    bias: torch.Tensor | None = None

    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.unbiased(hidden) + self.biases(hidden[..., self.weight.shape[1] :])

    def unbiased(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the products of only the hidden states [..., H or more], which do not depend on proposals."""
        return super().raw_logits(hidden[..., : self.weight.shape[1]])

    def biases(self, read: torch.Tensor) -> torch.Tensor:
        """Return the biases [..., V'] of e [..., r]."""
        assert self.bias is not None
        bias = self.bias if self.token_ids is None else self.bias[self.token_ids]
        return flat_linear(read.to(bias.dtype), bias)


class ConfidenceHead(nn.Module):
    """Predicts acceptance from the hidden state and, unless the config excludes it, the token before it."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 1)


class DSparkDrafter(DFlashDrafter):
    """The draft model. Parameter names are SGLang's: DFlash's, `markov_head.…`, `confidence_head.proj.…`.

    Hidden states of an offset are H + r wide: the backbone's state, and e of the previous token.
    """

    kind, recipe = TRAITS.kind, TRAITS.recipe
    autoregressive, samples_proposals, corrects_head = True, True, True
    float32_weights = ("confidence_head.",)

    def __init__(self, config: Qwen3Config, embedding: torch.Tensor):
        """Create the model.

        config: DFlash's, with `markov_rank`, `enable_confidence_head`, `confidence_head_with_markov` and
        `sample_from_anchor`.
        """
        super().__init__(config, embedding)
        self.from_anchor: bool = config.sample_from_anchor  # the anchor's query predicts offset 1
        self.markov_head = MarkovHead(config.vocab_size, config.markov_rank)
        self.confidence_reads_token: bool = config.confidence_head_with_markov
        width = config.hidden_size + (config.markov_rank if self.confidence_reads_token else 0)
        self.confidence_head = ConfidenceHead(width) if config.enable_confidence_head else None

    def initialise(self, generator: torch.Generator, head_weight: torch.Tensor) -> None:
        super().initialise(generator, head_weight)
        self.initialise_additions(generator)

    def initialise_additions(self, generator: torch.Generator, scale: float = 1.0) -> None:
        """Initialise the additions to DFlash: no bias, and a confidence of 1/2 for every proposal.

        scale: the scale of the target's logits. A DSpark's logits are the products themselves (`BiasedHead`).
        """
        with torch.no_grad():
            self.norm.weight.mul_(scale)
        self.markov_head.initialise(generator)
        if self.confidence_head is not None:
            for parameter in self.confidence_head.parameters():
                nn.init.zeros_(parameter)

    def backbone(self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor, K: int) -> torch.Tensor:
        """Return hidden states [B, A, K, H] of the offsets, which do not depend on proposals.

        anchor_tokens, anchors: [B, A].
        """
        queries = K if self.from_anchor else K + 1
        return self.block(context, anchor_tokens, anchors, queries)[:, :, queries - K :]

    def block_hidden(self, context: Context, tokens: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        hidden = self.backbone(context, tokens[..., 0], anchors, tokens.shape[-1])
        return torch.cat([hidden, self.markov_head.read(tokens)], -1)

    def head_over(self, target_head: torch.Tensor, token_ids: torch.Tensor | None) -> Head:
        head = Head.over(target_head, token_ids)
        return BiasedHead(head.weight, head.token_ids, bias=self.markov_head.markov_w2.weight)

    def block_sampler(
        self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor, block_size: int, head: Head
    ) -> MarkovSampler:
        return MarkovSampler(self, self.backbone(context, anchor_tokens, anchors, block_size - 1), head)

    @torch.no_grad()
    def propose(
        self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor, block_size: int, head: Head
    ) -> torch.Tensor:
        hidden = self.backbone(context, anchor_tokens, anchors, block_size - 1)

        def propose(hidden: torch.Tensor, anchor_tokens: torch.Tensor) -> torch.Tensor:
            return MarkovSampler(self, hidden, head).best(anchor_tokens)

        return propose_in_chunks(propose, hidden, anchor_tokens, (block_size - 1) * head.weight.shape[0])

    @property
    def has_confidence(self) -> bool:
        return self.confidence_head is not None

    def confidence(self, hidden: torch.Tensor) -> torch.Tensor:
        assert self.confidence_head is not None
        proj = self.confidence_head.proj
        if not self.confidence_reads_token:
            hidden = hidden[..., : self.config.hidden_size]
        logits: torch.Tensor = proj(hidden.to(proj.weight.dtype))
        return logits[..., 0].float()

    @property
    def queries(self) -> int:
        return self.block_size - self.from_anchor

    def operations(self, shape: StepShape, *, training: bool = True) -> float:
        """Count operations as in DFlash. A training adds:

        for each position with a loss, a third pass of V'·H, because logits with a trained bias are computed again in
        backward, and the bias itself, V'·r, in 4 passes; with an adapter, which leaves the bias as it is, in 2.
        """
        rank = self.markov_head.rank
        bias_passes = 4 if shape.rank is None else 2
        per_position = self.config.hidden_size + bias_passes * rank if training else rank
        heads = shape.head_positions * shape.head_rows * per_position
        return super().operations(shape, training=training) + 2.0 * heads


class MarkovSampler(BlockSampler):
    """Samples blocks after one backbone forward. Reads the head once for all offsets if `LOGITS_PER_CHUNK` allows."""

    head: BiasedHead

    def __init__(self, drafter: DSparkDrafter, hidden: torch.Tensor, head: Head):
        """Start before the first offset. hidden: [B, A, K, H]."""
        assert isinstance(head, BiasedHead)
        self._drafter, self._hidden, self.head = drafter, hidden, head
        self._drafted = 0
        count = hidden[..., 0].numel() * head.weight.shape[0]
        self._unbiased = head.unbiased(hidden) if count <= LOGITS_PER_CHUNK else None

    def _raw_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the products [B, A, V'] of the next offset. tokens: [B, A] before it."""
        k = self._drafted
        self._drafted += 1
        unbiased = self.head.unbiased(self._hidden[:, :, k]) if self._unbiased is None else self._unbiased[:, :, k]
        return unbiased + self.head.biases(self._drafter.markov_head.read(tokens))

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head.logit_map(self._raw_logits(tokens).float())

    def best(self, anchor_tokens: torch.Tensor) -> torch.Tensor:
        """Return the best token of every offset [B, A, K], each after the best one before it. anchor_tokens: [B, A]."""
        tokens = [anchor_tokens]
        for _ in range(self._hidden.shape[2]):
            tokens.append(argmax_of_products(self._raw_logits(tokens[-1]), self.head))
        return torch.stack(tokens[1:], -1)
