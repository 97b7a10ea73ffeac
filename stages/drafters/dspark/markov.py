"""The heads that read the token before an offset and bias the offset's logits: `W2 u`, of low rank.

Source: SGLang 0.5.20 (srt/models/dspark.py). Of the token's own row of W1, e, and the backbone's hidden state h:

- `vanilla`: u = e.
- `gated`: u = sigmoid(G [h, e]) * e.
- `rnn`: u = tanh(o), with [g, c, o] = J [s, e, h] and a state s that is zero in front of the first offset and becomes
  sigmoid(g) * s + (1 - sigmoid(g)) * tanh(c) behind each: it has seen all tokens of the block.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class MarkovHead(nn.Module):
    """`markov_w1` reads a token, `markov_w2` biases the next one's logits. Parameter names are SGLang's."""

    def __init__(self, vocabulary: int, rank: int):
        super().__init__()
        self.markov_w1 = nn.Embedding(vocabulary, rank)
        self.markov_w2 = nn.Linear(rank, vocabulary, bias=False)

    @property
    def rank(self) -> int:
        return self.markov_w1.embedding_dim

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """No bias; of what is trained W2 alone is zero, and so has a gradient."""
        nn.init.normal_(self.markov_w1.weight, std=self.rank**-0.5, generator=generator)
        nn.init.zeros_(self.markov_w2.weight)
        for projection in self.projections():
            nn.init.normal_(projection.weight, std=projection.in_features**-0.5, generator=generator)
            nn.init.zeros_(projection.bias)

    def projections(self) -> list[nn.Linear]:
        """What hidden states go through."""
        return []

    def read(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens before offsets [...] → e [..., r]."""
        return F.embedding(tokens, self.markov_w1.weight)

    def step(self, read: torch.Tensor, hidden: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:  # noqa: ARG002
        """u [..., r] of one offset, and the state behind it. read: e [..., r]; hidden: [..., H]; state: of the offset
        before, None in front of the first."""
        return read, state

    def along(self, read: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """u [..., K, r] of whole blocks. read: e [..., K, r]; hidden: [..., K, H]."""
        return self.step(read, hidden)[0]


class GatedMarkovHead(MarkovHead):
    """How much of each part of what was read counts depends on the offset."""

    def __init__(self, vocabulary: int, rank: int, hidden_size: int):
        super().__init__(vocabulary, rank)
        self.gate_proj = nn.Linear(hidden_size + rank, rank)

    def projections(self) -> list[nn.Linear]:
        return [self.gate_proj]

    def step(self, read: torch.Tensor, hidden: torch.Tensor, state: Any = None) -> tuple[torch.Tensor, Any]:
        gate = self.gate_proj(torch.cat([hidden.to(read.dtype), read], -1)).sigmoid()
        return gate.to(read.dtype) * read, state


class RecurrentMarkovHead(MarkovHead):
    """What was read earlier in the block counts too."""

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
        found, state = [], None
        for k in range(read.shape[-2]):
            of_offset, state = self.step(read[..., k, :], hidden[..., k, :], state)
            found.append(of_offset)
        return torch.stack(found, -2)


KINDS = ("vanilla", "gated", "rnn")  # as configs name them


def markov_head(kind: str, vocabulary: int, rank: int, hidden_size: int) -> MarkovHead:
    """kind: one of KINDS."""
    if kind == "vanilla":
        return MarkovHead(vocabulary, rank)
    return {"gated": GatedMarkovHead, "rnn": RecurrentMarkovHead}[kind](vocabulary, rank, hidden_size)
