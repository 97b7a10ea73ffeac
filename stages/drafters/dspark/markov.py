"""Heads that read the token before an offset and bias the offset's logits by `W2 u`, of low rank.

Source: SGLang 0.5.20 (srt/models/dspark.py). With the token's row e of W1, and the backbone's hidden state h:

- `vanilla`: u = e.
- `gated`: u = sigmoid(G [h, e]) * e.
- `rnn`: u = tanh(o), with [g, c, o] = J [s, e, h] and a state s that is zero before the first offset and becomes
  sigmoid(g) * s + (1 - sigmoid(g)) * tanh(c) after each: it has seen all tokens of the block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class MarkovHead(nn.Module):
    """A head whose `markov_w1` reads a token, and whose `markov_w2` biases the next one's logits (SGLang's names)."""

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
