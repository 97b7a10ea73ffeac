"""The EAGLE-3 draft model: one decoder layer that reads the target's features and its own proposals.

Source: arXiv 2503.01840, section 3, and the parameter layout of its public checkpoints. The feature of a verified
position is `fc` of three of the target's hidden states; that of a proposal is the layer's own output.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, LlamaRotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from draftsmith.stages.drafters.base import as_input
from draftsmith.stages.drafters.chain import Chain, ChainDrafter
from draftsmith.stages.drafters.compiled import fused
from draftsmith.stages.drafters.eagle3.config import TRAITS
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.spec import StepShape

FEATURES = 3  # low, middle, high


class EagleAttention(nn.Module):
    """Attention of chains over the prefix and over themselves; inputs are twice as wide as outputs."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim: int = config.head_dim
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(2 * config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(2 * config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(2 * config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, N, head_dim]

    def queries(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """Return rotated queries [B, heads, N, head_dim]. x: [B, N, 2H]."""
        return _rotated(self._heads(self.q_proj(x)), rope)

    def keys_values(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rotated keys and values, each [B, kv_heads, N, head_dim]. x: [B, N, 2H]."""
        values = self._heads(self.v_proj(x))
        return _rotated(self._heads(self.k_proj(x)), rope).to(values.dtype), values


def _rotated(x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    return apply_rotary_pos_emb(x, x, *rope)[0]


class EagleLayer(nn.Module):
    """The decoder layer. Its residual stream is the feature, not its normalised form."""

    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.self_attn = EagleAttention(config)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)  # of embeddings
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)  # of features
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def _joined(self, embedded: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Return the attention's input [B, N, 2H]."""
        return torch.cat([self.input_layernorm(embedded), self.hidden_norm(features)], -1)

    @fused
    def entries(
        self, embedded: torch.Tensor, features: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values. embedded, features: [B, N, H]."""
        return self.self_attn.keys_values(self._joined(embedded, features), rope)

    @fused
    def before(
        self, embedded: torch.Tensor, features: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return queries, keys and values. embedded, features: [B, N, H]."""
        x = self._joined(embedded, features)
        return self.self_attn.queries(x, rope), *self.self_attn.keys_values(x, rope)

    @fused
    def after(self, features: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Return the layer's output [B, N, H], the next feature, by residual and MLP.

        features: [B, N, H]; attended: [B, N, q].
        """
        x = features + self.self_attn.o_proj(attended)
        return x + self.mlp(self.post_attention_layernorm(x))


class Eagle3Drafter(ChainDrafter):
    """The draft model. Parameter names are those of public checkpoints: `fc`, `midlayer.…`, `norm`, `lm_head`."""

    kind, recipe = TRAITS.kind, TRAITS.recipe
    has_own_head = True
    layer_names = ("fc", "midlayer")

    def __init__(self, config: LlamaConfig, embedding: torch.Tensor, draft_tokens: torch.Tensor | None = None):
        """Create the model.

        config: Llama fields plus `block_size`, `draft_vocab_size` and `eagle_config`.
        embedding: [V, H]. draft_tokens: [draft_vocab_size] sorted ids of the target's vocabulary; default: the first.
        """
        super().__init__()
        self.config = config
        self.block_size: int = config.block_size
        self.target_layer_ids: list[int] = list(config.eagle_config["eagle_aux_hidden_state_layer_ids"] or ())
        self._embedding = (embedding,)  # in a tuple: neither a parameter nor a buffer of this module
        self.draft_tokens: torch.Tensor
        first = torch.arange(config.draft_vocab_size) if draft_tokens is None else draft_tokens
        self.register_buffer("draft_tokens", first, persistent=False)
        self.fc = nn.Linear(FEATURES * config.hidden_size, config.hidden_size, bias=False)
        self.midlayer = EagleLayer(config)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)

    def initialise(self, generator: torch.Generator, target_head: torch.Tensor) -> None:
        """Set random weights. The head starts as rows of the target's head; the norm gives its logits unit variance.

        target_head: [V, H].
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and name != "lm_head.weight":
                nn.init.normal_(parameter, std=0.02, generator=generator)
        with torch.no_grad():
            self.lm_head.weight.copy_(target_head[self.draft_tokens.to(target_head.device)].float())
            row_norm = self.lm_head.weight.norm(dim=-1).mean()
        nn.init.constant_(self.norm.weight, float(1.0 / row_norm))

    def rope(self, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cosines and sines at positions [B, N]."""
        rope: tuple[torch.Tensor, torch.Tensor] = self.rotary(like, position_ids=positions)
        return rope

    def fuse(self, features: torch.Tensor) -> torch.Tensor:
        fused: torch.Tensor = self.fc(as_input(features, self.norm.weight.dtype))
        return fused

    def entries(
        self, following: torch.Tensor, features: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(following)
        return self.midlayer.entries(x, features, self.rope(positions, x))

    def advance(self, chain: Chain, tokens: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, features = self.embed(tokens), chain.features
        attended = chain.attend(*self.midlayer.before(x, features, self.rope(positions, x)))
        features = self.midlayer.after(features, attended)
        return self.norm(features), features

    def head_over(self, target_head: torch.Tensor, token_ids: torch.Tensor | None) -> Head:  # noqa: ARG002
        if token_ids is not None:
            present = torch.isin(self.draft_tokens, token_ids.to(self.draft_tokens.device))
            return Head(self.lm_head.weight[present], self.draft_tokens[present])
        whole = self.draft_tokens.numel() == self.config.vocab_size
        return Head(self.lm_head.weight, None if whole else self.draft_tokens)

    def operations(self, shape: StepShape, *, training: bool = True) -> float:
        """Count the operations of a training, with N = rows · T positions, e = rows · A · K entries of chains, q and k
        the widths of queries and keys:

        fc: N · 3H², forward and the gradient of its weights (2 passes; the target's features need none); all other
        weights in 3 passes: N · 4Hk (prefix) + e · (3Hq + 4Hk + 3HI) (chains); attention, 2 products forward and 5
        backward (scores are computed again): K queries of width q of each chain over the positions before its anchor,
        and over 1 … K entries of its own; the trained head, whose logits are computed again in backward, 4 passes:
        P · V'·H.
        A pass is one product; each multiply-add counts as two operations. Without training there is one pass, or two
        products of attention. With an adapter (`StepShape.linear`) the head has 3 passes.
        """
        c, passes = self.config, 3 if training else 1
        H, K, mlp = c.hidden_size, self.block_size - 1, c.intermediate_size
        q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        N, entries = shape.prefixes * shape.rows * shape.width, shape.blocks * K
        maps = shape.linear(N, min(passes, 2), (FEATURES * H, H))
        maps += shape.linear(N, passes, (2 * H, k), (2 * H, k))
        maps += shape.linear(entries, passes, (2 * H, q), (2 * H, k), (2 * H, k), (q, H), (H, mlp), (H, mlp), (mlp, H))
        attention = K * q * shape.seen_within(None) + entries * q * (K + 1) / 2
        head = shape.head_positions * shape.head_rows * H
        attention_passes, head_passes = (7, 4 if shape.rank is None else 3) if training else (2, 1)
        return 2.0 * (maps + attention_passes * attention + head_passes * head)
