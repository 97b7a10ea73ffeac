"""The DSpark draft model: one backbone forward drafts a block, whose offsets then see the proposals before them.

Source: arXiv 2607.05147, and SGLang 0.5.23 (srt/models/dspark.py, srt/speculative/dspark_components). The backbone is
DFlash's. The logits of an offset are the target's head of its hidden state plus a low-rank bias of the token before it
(`MarkovHead`), so a block is sampled offset by offset, and each offset has its own q. A linear head predicts, from
hidden state and token or from the state alone, how probable it is that the proposal is accepted, given that those
before it are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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
    """A head that reads the token before an offset and biases the offset's logits by `W2 u`, of low rank.

    Source: SGLang 0.5.20 (srt/models/dspark.py), whose names are `markov_w1` and `markov_w2`. With the token's row e of
    W1, and the backbone's hidden state h:

    - `vanilla`: u = e.
    - `gated`: u = sigmoid(G [h, e]) * e.
    - `rnn`: u = tanh(o), with [g, c, o] = J [s, e, h] and a state s that is zero before the first offset and becomes
      sigmoid(g) * s + (1 - sigmoid(g)) * tanh(c) after each: it has seen all tokens of the block.
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
        """Start without a bias: W2 alone is zero, and so has a gradient."""
        nn.init.normal_(self.markov_w1.weight, std=self.rank**-0.5, generator=generator)
        nn.init.zeros_(self.markov_w2.weight)
        for projection in self.projections():
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5, generator=generator)
            nn.init.zeros_(projection.bias)

    def projections(self) -> list[nn.Linear]:
        """Return the projections of hidden states."""
        return []

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return e [..., r] of the tokens [...] before offsets."""
        return F.embedding(tokens, self.markov_w1.weight)

    def step(self, read: torch.Tensor, hidden: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:  # noqa: ARG002
        """Return u [..., r] of one offset, and the state after it.

        read: e [..., r]; hidden: [..., H]; state: of the previous offset, None before the first.
        """
        return read, state

    def along(self, read: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Return u [..., K, r] of whole blocks. read: e [..., K, r]; hidden: [..., K, H]."""
        return self.step(read, hidden)[0]


class GatedMarkovHead(MarkovHead):
    """A head that gates e by the hidden state of the offset."""

    def __init__(self, vocabulary: int, rank: int, hidden_size: int):
        super().__init__(vocabulary, rank)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def projections(self) -> list[nn.Linear]:
        return [self.gate_proj]

    def step(self, read: torch.Tensor, hidden: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        gate = self.gate_proj(torch.cat([hidden.to(read.dtype), read], -1)).sigmoid()
        return gate.to(read.dtype) * read, state


class RecurrentMarkovHead(MarkovHead):
    """A head with a state over all tokens of the block."""

    def __init__(self, vocabulary: int, rank: int, hidden_size: int):
        super().__init__(vocabulary, rank)
        self.joint_proj = nn.Linear(2 * rank + hidden_size, 3 * rank)

    def projections(self) -> list[nn.Linear]:
        return [self.joint_proj]

    def step(self, read: torch.Tensor, hidden: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        before = torch.zeros_like(read) if state is None else state
        joint = self.joint_proj(torch.cat([before, read, hidden.to(read.dtype)], -1)).to(read.dtype)
        gate, candidate, out = joint.chunk(3, -1)
        gate = gate.sigmoid()
        return out.tanh(), gate * before + (1 - gate) * candidate.tanh()

    def along(self, read: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        offsets, state = [], None
        for k in range(read.shape[-2]):
            u, state = self.step(read[..., k, :], hidden[..., k, :], state)
            offsets.append(u)
        return torch.stack(offsets, -2)


KINDS = ("vanilla", "gated", "rnn")  # as configs name them


def markov_head(kind: str, vocabulary: int, rank: int, hidden_size: int) -> MarkovHead:
    """Create a head. kind: one of KINDS."""
    if kind == "vanilla":
        return MarkovHead(vocabulary, rank)
    return {"gated": GatedMarkovHead, "rnn": RecurrentMarkovHead}[kind](vocabulary, rank, hidden_size)


@dataclass(frozen=True)
class BiasedHead(Head):
    """The target's head over hidden states, plus `bias` [V, r] over u of the token before them (`MarkovHead`).

    Its products are the logits, whatever scale or soft cap the target's own have: SGLang samples from their softmax
    (srt/models/dspark.py, `compute_base_logits`), and losses compare it with the target's distribution.
    It takes both concatenated, [..., H + r], and ignores later columns. The bias is over all tokens: its rows are read
    at every use, so that several graphs with separate gradients can share one head.
    """

    bias: torch.Tensor | None = None

    def raw_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        rank = 0 if self.bias is None else self.bias.shape[1]
        return self.unbiased(hidden) + self.biases(hidden[..., self.weight.shape[1] :][..., :rank])

    def unbiased(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the products of the hidden states alone [..., H or more], which do not depend on proposals."""
        return super().raw_logits(hidden[..., : self.weight.shape[1]])

    def biases(self, u: torch.Tensor) -> torch.Tensor:
        """Return the biases [..., V'] of u [..., r]."""
        assert self.bias is not None
        bias = self.bias if self.token_ids is None else self.bias[self.token_ids]
        return flat_linear(u.to(bias.dtype), bias)


class ConfidenceHead(nn.Module):
    """Predicts acceptance from the hidden state and, unless the config excludes it, the token before it."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Linear(width, 1)


class DSparkDrafter(DFlashDrafter):
    """The draft model. Parameter names are SGLang's: DFlash's, `markov_head.…`, `confidence_head.proj.…`.

    Hidden states of an offset are H + r wide: the backbone's, and u of the bias. If e of the token before differs from
    u and the confidence reads it, as in most checkpoints, e follows, r wide.
    """

    kind, recipe = TRAITS.kind, TRAITS.recipe
    autoregressive, samples_proposals, corrects_head = True, True, True

    def __init__(self, config: Qwen3Config, embedding: torch.Tensor):
        """Create the model.

        config: as for DFlash, with `markov_rank`, `enable_confidence_head`, `confidence_head_with_markov` and
        `sample_from_anchor`.
        """
        super().__init__(config, embedding)
        self.from_anchor: bool = config.sample_from_anchor  # the anchor's own query is the one of offset 1
        sizes = config.vocab_size, config.markov_rank, config.hidden_size
        self.markov_head = markov_head(config.markov_head_type, *sizes)
        self.confidence_reads_token: bool = config.confidence_head_with_markov
        width = config.hidden_size + (config.markov_rank if self.confidence_reads_token else 0)
        self.confidence_head = ConfidenceHead(width) if config.enable_confidence_head else None

    def initialise(self, generator: torch.Generator, head_weight: torch.Tensor) -> None:
        super().initialise(generator, head_weight)
        self.initialise_additions(generator)

    def initialise_additions(self, generator: torch.Generator) -> None:
        """Initialise what DFlash lacks: no bias, and a confidence of 1/2 for every proposal."""
        self.markov_head.initialise(generator)
        if self.confidence_head is not None:
            nn.init.zeros_(self.confidence_head.proj.weight)
            nn.init.zeros_(self.confidence_head.proj.bias)

    def with_bias(self, hidden: torch.Tensor, u: torch.Tensor, read: torch.Tensor) -> torch.Tensor:
        """Concatenate what the heads take. hidden: [..., H]; u, read: [..., r]."""
        return torch.cat([hidden, u, read] if self._confidence_reads_e else [hidden, u], -1)

    @property
    def _confidence_reads_e(self) -> bool:
        """Whether the confidence reads e, and u differs from it."""
        return self.has_confidence and self.confidence_reads_token and bool(self.markov_head.projections())

    def backbone(self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor, K: int) -> torch.Tensor:
        """Return hidden states [B, A, K, H] of the offsets, which do not depend on proposals.

        anchor_tokens, anchors: [B, A].
        """
        queries = K if self.from_anchor else K + 1
        return self.block(context, anchor_tokens, anchors, queries)[:, :, queries - K :]

    def block_hidden(self, context: Context, tokens: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        hidden = self.backbone(context, tokens[..., 0], anchors, tokens.shape[-1])
        read = self.markov_head.read(tokens)
        return self.with_bias(hidden, self.markov_head.along(read, hidden), read)

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
        proj, rank = self.confidence_head.proj, self.markov_head.rank
        if not self.confidence_reads_token:
            hidden = hidden[..., : self.config.hidden_size]
        elif self._confidence_reads_e:
            hidden = torch.cat([hidden[..., : -2 * rank], hidden[..., -rank:]], -1)
        logits: torch.Tensor = proj(hidden.to(proj.weight.dtype))
        return logits[..., 0].float()

    @property
    def queries(self) -> int:
        return self.block_size - self.from_anchor

    def operations(self, shape: StepShape, *, training: bool = True) -> float:
        """Count operations as for DFlash, and in addition, in a training:

        for each position with a loss, a third pass of V'·H, because logits with a trained bias are computed again in
        backward, and the bias itself, V'·r, in 4 passes; for every offset its projections, in 3.
        """
        H, rank, K = self.config.hidden_size, self.markov_head.rank, self.block_size - 1
        projections = sum(p.weight.numel() for p in self.markov_head.projections())
        passes, of_position = (3, H + 4 * rank) if training else (1, rank)
        heads = shape.head_positions * shape.head_rows * of_position
        return super().operations(shape, training=training) + 2.0 * (heads + passes * shape.blocks * K * projections)


class MarkovSampler(BlockSampler):
    """Samples blocks after one backbone forward. If `LOGITS_PER_CHUNK` suffice, the head is read once for all."""

    head: BiasedHead

    def __init__(self, drafter: DSparkDrafter, hidden: torch.Tensor, head: Head):
        """hidden: [B, A, K, H]."""
        assert isinstance(head, BiasedHead)
        self._drafter, self._hidden, self.head = drafter, hidden, head
        self._drafted, self._state = 0, None
        count = hidden[..., 0].numel() * head.weight.shape[0]
        self._unbiased = head.unbiased(hidden) if count <= LOGITS_PER_CHUNK else None

    def _raw_logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the products [B, A, V'] of the next offset. tokens: [B, A] before it."""
        markov, k = self._drafter.markov_head, self._drafted
        u, self._state = markov.step(markov.read(tokens), self._hidden[:, :, k], self._state)
        self._drafted += 1
        unbiased = self.head.unbiased(self._hidden[:, :, k]) if self._unbiased is None else self._unbiased[:, :, k]
        return unbiased + self.head.biases(u)

    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head.logit_map(self._raw_logits(tokens).float())

    def best(self, anchor_tokens: torch.Tensor) -> torch.Tensor:
        """Return the best token of every offset [B, A, K], each after the best one before it. anchor_tokens: [B, A]."""
        tokens = [anchor_tokens]
        for _ in range(self._hidden.shape[2]):
            tokens.append(argmax_of_products(self._raw_logits(tokens[-1]), self.head))
        return torch.stack(tokens[1:], -1)
