"""EAGLE-3's forward (arXiv 2503.01840) written out: one entry, one head, one query, one key at a time, in float64.

No mask, no batch, no cache, no padding; the only thing shared with the fast implementation is the names of the tensors.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from tests.stages.drafters.dflash.reference import Tensors, rms_norm, rotate


@dataclass
class Shape:
    """The sizes that the tensors do not show."""

    heads: int
    kv_heads: int
    eps: float
    theta: float


class Chain:
    """The chain after one anchor of one sequence.

    The entry at position i is made of the token at i + 1 and the feature of position i. Before anchor - 1 both are the
    trajectory's. From there on the chain gives the tokens; its first feature is the target's, the others are its own.
    """

    def __init__(
        self,
        tensors: Tensors,
        embedding: torch.Tensor,
        features: torch.Tensor,
        tokens: list[int],
        anchor: int,
        shape: Shape,
    ):
        """embedding: [V, H]; features: [T, K*H] of positions 0 … T-1, of which those before the anchor are read."""
        self.weights = {name: tensor.detach().double() for name, tensor in tensors.items()}
        self.embedding, self.shape = embedding, shape
        fused = [self.weights["fc.weight"] @ features[i].double() for i in range(anchor)]
        self.entries = [(i, self._joined(tokens[i + 1], fused[i])) for i in range(anchor - 1)]
        self.position, self.feature = anchor - 1, fused[anchor - 1]

    def _of_layer(self, name: str) -> torch.Tensor:
        return self.weights[f"midlayer.{name}.weight"]

    def _joined(self, token: int, feature: torch.Tensor) -> torch.Tensor:
        """Return the attention's input [2H]."""
        embedded = rms_norm(self.embedding[token].double(), self._of_layer("input_layernorm"), self.shape.eps)
        return torch.cat([embedded, rms_norm(feature, self._of_layer("hidden_norm"), self.shape.eps)])

    def _project(self, x: torch.Tensor, which: str, head: int) -> torch.Tensor:
        weight = self._of_layer(f"self_attn.{which}_proj")
        size = len(weight) // (self.shape.heads if which == "q" else self.shape.kv_heads)
        return weight[head * size : (head + 1) * size] @ x

    def step(self, token: int) -> torch.Tensor:
        """Take the next token of the chain, and return the hidden state [H] that predicts the following one."""
        here, feature = self.position, self.feature
        x = self._joined(token, feature)
        self.entries.append((here, x))
        parts = []
        for head in range(self.shape.heads):
            shared = head * self.shape.kv_heads // self.shape.heads
            query = rotate(self._project(x, "q", head), here, self.shape.theta)
            scores, values = [], []
            for position, seen in self.entries:
                key = rotate(self._project(seen, "k", shared), position, self.shape.theta)
                scores.append(float(query @ key) / math.sqrt(len(query)))
                values.append(self._project(seen, "v", shared))
            largest = max(scores)
            shares = [math.exp(score - largest) for score in scores]
            parts.append(sum((s / sum(shares) * v for s, v in zip(shares, values, strict=True)), torch.zeros(())))
        feature = feature + self._of_layer("self_attn.o_proj") @ torch.cat(parts)
        inner = rms_norm(feature, self._of_layer("post_attention_layernorm"), self.shape.eps)
        gate = self._of_layer("mlp.gate_proj") @ inner
        gated = gate * torch.sigmoid(gate) * (self._of_layer("mlp.up_proj") @ inner)
        self.feature = feature + self._of_layer("mlp.down_proj") @ gated
        self.position += 1
        return rms_norm(self.feature, self.weights["norm.weight"], self.shape.eps)

    def draft(self, anchor_token: int, count: int, draft_tokens: list[int]) -> list[int]:
        """Return `count` greedy proposals among `draft_tokens`, the target's ids of the head's rows."""
        proposed = [anchor_token]
        for _ in range(count):
            proposed.append(draft_tokens[int((self.weights["lm_head.weight"] @ self.step(proposed[-1])).argmax())])
        return proposed[1:]
