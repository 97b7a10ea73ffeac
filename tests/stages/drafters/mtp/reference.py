"""A native head written out from the engines' model files, in float64: one sequence, no cache.

It reads the tensors under the names of the published checkpoints, and shares nothing with the fast implementation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Rules:
    """What a family's engine does around the layer."""

    prefix: str
    names: tuple[str, str, str, str]  # norms of embedding and hidden state, the join, the last norm
    layer: str = ""  # prefix of the decoder layer's tensors
    hidden_first: bool = False
    from_normed: bool = True  # the target's state after its final norm
    feeds_normed: bool = True
    zeroes_first: bool = False
    plus_one: bool = False  # norms multiply by 1 + weight
    skips: frozenset[str] = frozenset()  # parts that are skipped, to show that they matter


_NEXTN = Rules("model.layers.2.", ("enorm", "hnorm", "eh_proj", "shared_head.norm"))
_QWEN = Rules("mtp.", ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"), layer="layers.0.", plus_one=True)
_MIMO = Rules(
    "model.mtp_layers.0.",
    ("token_layernorm", "hidden_layernorm", "input_proj", "final_layernorm"),
    hidden_first=True,
    zeroes_first=True,
)
RULES = {
    ("mimo", "sglang"): _MIMO,
    ("mimo", "vllm"): replace(_MIMO, from_normed=False),
    ("glm4_moe", "sglang"): _NEXTN,
    ("glm4_moe", "vllm"): replace(_NEXTN, feeds_normed=False, zeroes_first=True),
    ("deepseek_v3", "sglang"): _NEXTN,
    ("deepseek_v3", "vllm"): replace(_NEXTN, zeroes_first=True),
    ("qwen3_next", "sglang"): _QWEN,
    ("qwen3_5_text", "sglang"): _QWEN,
    ("qwen3_5_text", "vllm"): _QWEN,
}


class Reference:
    """The head of one checkpoint, unrolled on given tokens."""

    def __init__(self, tensors: Mapping[str, torch.Tensor], config: Any, family: str, rules: Rules):
        """tensors: of the target's file. config: the target's text config."""
        prefix = rules.prefix
        self.w = {name.removeprefix(prefix): t.double() for name, t in tensors.items() if name.startswith(prefix)}
        self.embedding, self.final = (
            tensors["model.embed_tokens.weight"].double(),
            tensors["model.norm.weight"].double(),
        )
        self.config, self.family, self.rules = config, family, rules

    def norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        weight = weight + 1 if self.rules.plus_one else weight
        return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + self.config.rms_norm_eps) * weight

    def unroll(self, states: torch.Tensor, tokens: list[int], anchor: int, chain: list[int]) -> torch.Tensor:
        """Return [K, H]: what predicts the tokens after each of `chain`, whose first token is at `anchor`.

        states: [T, H] after the target's last layer, before its final norm.
        """
        states = states.double()
        if self.rules.from_normed and "final norm" not in self.rules.skips:
            states = self.norm(states, self.final)
        features, text, out = list(states[:anchor]), [*tokens[:anchor], *chain], []
        for step in range(len(chain)):
            entries = torch.stack([self.joined(text[i + 1], features[i], i) for i in range(anchor + step)])
            output = self.layer(entries)[-1]
            hidden = self.norm(output, self.w[f"{self.rules.names[3]}.weight"])
            out.append(hidden)
            features.append(hidden if self.rules.feeds_normed else output)
        return torch.stack(out)

    def joined(self, token: int, feature: torch.Tensor, position: int) -> torch.Tensor:
        of_embedding, of_hidden, join, _ = self.rules.names
        embedded = self.embedding[token]
        if self.rules.zeroes_first and position == 0:
            embedded = torch.zeros_like(embedded)
        if "embedding's norm" not in self.rules.skips:
            embedded = self.norm(embedded, self.w[f"{of_embedding}.weight"])
        if "hidden norm" not in self.rules.skips:
            feature = self.norm(feature, self.w[f"{of_hidden}.weight"])
        parts = [feature, embedded] if self.rules.hidden_first else [embedded, feature]
        return self.w[f"{join}.weight"] @ torch.cat(parts)

    # ---- the target's decoder layer

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.w[f"{self.rules.layer}{name}.weight"], self.w.get(f"{self.rules.layer}{name}.bias"))

    def of_layer(self, name: str) -> torch.Tensor:
        return self.w[f"{self.rules.layer}{name}.weight"]

    def layer(self, x: torch.Tensor) -> torch.Tensor:
        inner = self.norm(x, self.of_layer("input_layernorm"))
        x = x + (self.latent(inner) if self.family == "deepseek_v3" else self.attention(inner))
        inner = self.norm(x, self.of_layer("post_attention_layernorm"))
        return x + self.mlp(inner)

    def rotate(self, x: torch.Tensor, dimensions: int, *, neighbours: bool = False) -> torch.Tensor:
        """Rotate the first dimensions of [N, heads, D] by position: pairs (i, i + d/2), or neighbours (2i, 2i + 1)."""
        theta = self.config.rope_parameters["rope_theta"]
        angles = torch.arange(len(x))[:, None] * theta ** (-torch.arange(0, dimensions, 2).double() / dimensions)
        cos, sin = angles.cos()[:, None], angles.sin()[:, None]
        part = x[..., :dimensions]
        a, b = (part[..., ::2], part[..., 1::2]) if neighbours else part.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., dimensions:]], -1)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Return causal attention [N, heads · D'] of [N, heads, D] each."""
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        scores = torch.einsum("nhd,mhd->hnm", q, k) / math.sqrt(q.shape[-1])
        ahead = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
        return torch.einsum("hnm,mhd->nhd", scores.masked_fill(ahead, -math.inf).softmax(-1), v).flatten(1)

    def attention(self, x: torch.Tensor) -> torch.Tensor:
        gated = self.family.startswith("qwen3")
        size = getattr(self.config, "head_dim", None) or self.config.hidden_size // self.config.num_attention_heads
        q, k, v = (self.linear(x, f"self_attn.{name}_proj") for name in "qkv")
        k, v = k.unflatten(-1, (-1, size)), v.unflatten(-1, (-1, size))
        q, gate = q.unflatten(-1, (-1, 2 * size)).chunk(2, -1) if gated else (q.unflatten(-1, (-1, size)), None)
        if f"{self.rules.layer}self_attn.q_norm.weight" in self.w:
            q, k = self.norm(q, self.of_layer("self_attn.q_norm")), self.norm(k, self.of_layer("self_attn.k_norm"))
        rotated = int(size * self.config.rope_parameters.get("partial_rotary_factor", 1.0))
        out = self.attend(self.rotate(q, rotated), self.rotate(k, rotated), v)
        return self.linear(out if gate is None else out * gate.flatten(1).sigmoid(), "self_attn.o_proj")

    def latent(self, x: torch.Tensor) -> torch.Tensor:
        """Return DeepSeek's multi-head latent attention."""
        c = self.config
        plain, rotary = c.qk_nope_head_dim, c.qk_rope_head_dim
        q = self.norm(self.linear(x, "self_attn.q_a_proj"), self.of_layer("self_attn.q_a_layernorm"))
        q = self.linear(q, "self_attn.q_b_proj").unflatten(-1, (-1, plain + rotary))
        latent, k_rot = self.linear(x, "self_attn.kv_a_proj_with_mqa").split([c.kv_lora_rank, rotary], -1)
        latent = self.norm(latent, self.of_layer("self_attn.kv_a_layernorm"))
        k, v = (
            self.linear(latent, "self_attn.kv_b_proj")
            .unflatten(-1, (-1, plain + c.v_head_dim))
            .split([plain, c.v_head_dim], -1)
        )
        k_rot = self.rotate(k_rot[:, None], rotary, neighbours=True).expand(-1, k.shape[1], -1)
        q = torch.cat([q[..., :plain], self.rotate(q[..., plain:], rotary, neighbours=True)], -1)
        return self.linear(self.attend(q, torch.cat([k, k_rot], -1), v), "self_attn.o_proj")

    def gated(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return self.linear(
            F.silu(self.linear(x, f"{name}.gate_proj")) * self.linear(x, f"{name}.up_proj"), f"{name}.down_proj"
        )

    def mlp(self, x: torch.Tensor) -> torch.Tensor:
        if f"{self.rules.layer}mlp.gate.weight" not in self.w:
            return self.gated(x, "mlp")
        c, logits = self.config, self.linear(x, "mlp.gate")
        if self.family == "qwen3_next":
            scores, bias, scale = logits.softmax(-1), torch.zeros(1), 1.0
            shared = self.linear(x, "mlp.shared_expert_gate").sigmoid() * self.gated(x, "mlp.shared_expert")
        else:
            scores, bias = logits.sigmoid(), self.w["mlp.gate.e_score_correction_bias"]
            scale, shared = c.routed_scaling_factor, self.gated(x, "mlp.shared_experts")
        chosen = (scores + bias).topk(c.num_experts_per_tok, -1).indices
        weights = scores.gather(-1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) if c.norm_topk_prob else weights
        out = torch.zeros_like(x) if "shared experts" in self.rules.skips else shared
        for n, row in enumerate(x):
            for weight, expert in zip(scale * weights[n], chosen[n].tolist(), strict=True):
                out[n] = out[n] + weight * self.gated(row, f"mlp.experts.{expert}")
        return out
