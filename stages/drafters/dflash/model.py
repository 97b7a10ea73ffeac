"""The DFlash draft model: a small bidirectional transformer over one block, reading the target's features.

Source: arXiv 2602.06036, section 3, and the parameter layout of z-lab's public checkpoints.
Queries are the embeddings of `[anchor, MASK × (B-1)]`; keys and values are the target's features before the anchor
and the block itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm, Qwen3RotaryEmbedding, apply_rotary_pos_emb

from draftsmith.stages.drafters.base import Context, Drafter, argmax_tokens, as_input
from draftsmith.stages.drafters.block_attention import ContextMask, KeysValues, block_attention
from draftsmith.stages.drafters.compiled import fused
from draftsmith.stages.drafters.dflash.config import TRAITS
from draftsmith.stages.drafters.lm_head import Head
from draftsmith.stages.drafters.spec import StepShape
from draftsmith.stages.targets.kv_cache import KeyValueSlots, Rows


@dataclass
class FeatureContext(Context):
    """Keys and values [B, kv_heads, T, head_dim] of the target's features per layer, rotated to their positions."""

    layers: list[KeysValues]  # entry i is position i
    window: int | None = None  # positions before its anchor that a block sees; None: all of them
    rings: bool = False  # in layers with a window, entry i is the newest position that is i modulo their length


@dataclass
class FeatureSlots(Context):
    """The context while decoding, with one row per request. A layer with a window keeps its reach in a ring."""

    layers: list[KeyValueSlots]


@dataclass(frozen=True)
class AttentionSpan:
    """The positions that the queries of a layer see, as SGLang reads it from a config."""

    window: int | None  # positions, the query's own included, of context and block; None: all
    causal: bool  # no position of the block after the query

    @classmethod
    def by_layer(cls, config: Any) -> list[AttentionSpan]:
        """Return the span of every layer.

        Full layers read a block in both directions, sliding ones only backwards. `is_causal`, if set, decides for all.
        """
        causal = getattr(config, "is_causal", None)
        sliding = [kind == "sliding_attention" for kind in config.layer_types]
        return [cls(config.sliding_window if s else None, s if causal is None else causal) for s in sliding]


class DFlashAttention(nn.Module):
    """Attention of block queries over context and block. `k_proj`, `v_proj` and `k_norm` serve both."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.head_dim: int = config.head_dim
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.attention_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=config.attention_bias)
        self.q_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = Qwen3RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head_dim))  # [..., heads, head_dim]

    def keys_values(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rotated keys and values, each [B, kv_heads, T, head_dim]. x: [B, T, H]."""
        keys = self.k_norm(self._heads(self.k_proj(x))).transpose(1, 2)
        keys, _ = apply_rotary_pos_emb(keys, keys, *rope)
        values = self._heads(self.v_proj(x)).transpose(1, 2)
        return keys.to(values.dtype), values  # under autocast the norm returns float32

    def of_blocks(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], blocks: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return rotated queries, keys and values, each [B, heads, A, S, head_dim]. x: [B, Q, H] of A blocks."""
        queries = self.q_norm(self._heads(self.q_proj(x))).transpose(1, 2)
        queries, _ = apply_rotary_pos_emb(queries, queries, *rope)
        keys, values = self.keys_values(x, rope)
        return queries.unflatten(2, (blocks, -1)), keys.unflatten(2, (blocks, -1)), values.unflatten(2, (blocks, -1))


class DFlashLayer(nn.Module):
    """A Qwen3 decoder layer around DFlash attention."""

    def __init__(self, config: Qwen3Config):
        super().__init__()
        self.self_attn = DFlashAttention(config)
        self.mlp = Qwen3MLP(config)
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    @fused
    def keys_values(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return keys and values of the context, read as it is: `input_layernorm` is for the block only."""
        return self.self_attn.keys_values(x, rope)

    def forward(
        self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], context: KeysValues, context_mask: ContextMask
    ) -> torch.Tensor:
        """Run the layer. x: [B, Q, H] positions of A blocks, equally many per block; context_mask: of these blocks."""
        queries, keys, values, *rest = self.before(x, rope, context_mask.seen.shape[1])
        return self.after(x, block_attention(queries, context, (keys, values), context_mask), *rest)

    @fused
    def before(self, x: torch.Tensor, rope: tuple[torch.Tensor, torch.Tensor], blocks: int) -> tuple[torch.Tensor, ...]:
        """Return the queries, keys and values of x [B, Q, H], and further inputs of `after`."""
        return self.self_attn.of_blocks(self.input_layernorm(x), rope, blocks)

    @fused
    def after(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Return the layer's output. attended: [B, A, S, q]."""
        x = x + self.self_attn.o_proj(attended.flatten(1, 2))
        return x + self.mlp(self.post_attention_layernorm(x))


class DFlashDrafter(Drafter):
    """The draft model. Parameter names are z-lab's: `fc`, `hidden_norm`, `norm`, `layers.{i}.…`.

    Embedding and head are the target's.
    """

    kind, recipe = TRAITS.kind, TRAITS.recipe
    autoregressive, has_own_head = False, False
    layer_names = ("fc", "layers")

    def __init__(self, config: Qwen3Config, embedding: torch.Tensor):
        """Build the layers.

        config: Qwen3 fields plus `block_size` and `dflash_config`, as z-lab has them. embedding: [V, H].
        """
        super().__init__()
        self.config = config
        self.block_size: int = config.block_size
        self.target_layer_ids: list[int] = list(config.dflash_config["target_layer_ids"])
        self.mask_token_id: int = config.dflash_config["mask_token_id"]
        self._embedding = (embedding,)  # in a tuple: neither a parameter nor a buffer of this module
        self.fc = nn.Linear(len(self.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.layers = nn.ModuleList([self._layer(config) for _ in range(config.num_hidden_layers)])
        self.spans = AttentionSpan.by_layer(config)
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary = Qwen3RotaryEmbedding(config)

    def _layer(self, config: Qwen3Config) -> DFlashLayer:
        return DFlashLayer(config)

    def initialise(self, generator: torch.Generator, head_weight: torch.Tensor) -> None:
        """Set random weights with a sane first loss, about the logarithm of the vocabulary's size. head_weight: [V, H].

        Two things make a naive start explode. The frozen head expects the scale of the target's final norm, tens of
        units: so the final norm starts where the logits have unit variance. And every query starts from the same
        mask embedding, whose own logit would tower over all others: the layers' outputs start large enough to drown it.
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes_to_stream = "down_proj" in name or "o_proj" in name
                nn.init.normal_(parameter, std=0.06 if writes_to_stream else 0.02, generator=generator)
        row_norm = head_weight.float().norm(dim=-1).mean()
        nn.init.constant_(self.norm.weight, float(1.0 / row_norm))

    def _rope(self, positions: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return self.rotary(like, position_ids=positions)

    def encode(self, features: torch.Tensor, tokens: torch.Tensor, positions: torch.Tensor) -> FeatureContext:  # noqa: ARG002
        x = self.hidden_norm(self.fc(as_input(features, self.norm.weight.dtype)))
        rope = self._rope(positions, x)
        return FeatureContext([layer.keys_values(x, rope) for layer in self._layers()])

    def _layers(self) -> Iterator[DFlashLayer]:
        for layer in self.layers:
            assert isinstance(layer, DFlashLayer)
            yield layer

    def block_hidden(self, context: Context, tokens: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        return self.block(context, tokens[..., 0], anchors, tokens.shape[-1] + 1)[:, :, 1:]

    def block(self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor, queries: int) -> torch.Tensor:
        """Return hidden states [B, A, queries, H] of blocks of an anchor and masks. anchor_tokens, anchors: [B, A]."""
        assert isinstance(context, FeatureContext)
        B, A = anchors.shape
        block = anchor_tokens.new_full((B, A, queries), self.mask_token_id)
        block[..., 0] = anchor_tokens
        positions = (anchors[..., None] + torch.arange(queries, device=anchors.device)).flatten(1)
        x = F.embedding(block.flatten(1), self._embedding[0]).to(self.norm.weight.dtype) * self.embedding_scale
        first = None if context.window is None else anchors - context.window
        masks = {
            span: ContextMask(anchors, first, span.window, span.causal, context.rings and span.window is not None)
            for span in self.spans
        }
        rope = self._rope(positions, x)
        for layer, span, keys_values in zip(self._layers(), self.spans, context.layers, strict=True):
            x = layer(x, rope, keys_values, masks[span])
        return self.norm(x).unflatten(1, (A, queries))

    @property
    def queries(self) -> int:
        """Return the number of block tokens that the layers read."""
        return self.block_size

    def operations(self, shape: StepShape, *, training: bool = True) -> float:
        """Count the operations of a training, with N = rows · T positions, b = rows · A blocks of B tokens, q and k the
        widths of queries and keys:

        fc: N · F·H², forward and the gradient of its weights (2 passes; the target's features need none); all other
        weights in 3 passes: N · L·2Hk (context) + b·B · L·(2Hq + 2Hk + 3HI) (blocks); attention, L times, 2 products
        forward and 5 backward (scores are computed again): B queries of width q of each block over the positions before
        its anchor, as many as the layer's window holds, and over the block; the frozen head, 2 passes: P · V'·H.
        A pass is one product; each multiply-add counts as two operations. Without training there is one pass, or two
        products of attention. With an adapter: `StepShape.linear`, as if the first layer's input had a gradient.
        """
        c, passes = self.config, 3 if training else 1
        H, B, mlp = c.hidden_size, self.queries, c.intermediate_size
        q, k = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        N, tokens = shape.prefixes * shape.rows * shape.width, shape.blocks * B
        fc = shape.linear(N, min(passes, 2), (len(self.target_layer_ids) * H, H))
        layer = shape.linear(N, passes, (H, k), (H, k))
        layer += shape.linear(tokens, passes, (H, q), (H, k), (H, k), (q, H), (H, mlp), (H, mlp), (mlp, H))
        seen = sum(shape.seen_within(span.window) for span in self.spans)  # of all layers
        attention = B * q * seen + c.num_hidden_layers * tokens * q * B
        head = shape.head_positions * shape.head_rows * H
        attention_passes, head_passes = (7, 2) if training else (2, 1)
        return 2.0 * (fc + c.num_hidden_layers * layer + attention_passes * attention + head_passes * head)

    def new_context(self, rows: int, capacity: int) -> FeatureSlots:
        entries = [capacity if s.window is None else min(capacity, s.window + self.block_size) for s in self.spans]
        return FeatureSlots([KeyValueSlots(rows, count) for count in entries])

    @torch.no_grad()
    def propose(
        self, context: Context, anchor_tokens: torch.Tensor, anchors: torch.Tensor, block_size: int, head: Head
    ) -> torch.Tensor:
        hidden = self.block_hidden(context, anchor_tokens[..., None].expand(-1, -1, block_size - 1), anchors)
        return argmax_tokens(hidden, head)

    def head_over(self, target_head: torch.Tensor, token_ids: torch.Tensor | None) -> Head:
        return Head.over(target_head, token_ids, self.logit_map)

    def extend(
        self,
        context: Context,
        rows: Rows,
        features: torch.Tensor,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        lengths: torch.Tensor | None = None,
    ) -> None:
        assert isinstance(context, FeatureSlots)
        if isinstance(rows, slice):
            rows = torch.arange(rows.start, rows.stop, device=positions.device)
        encoded = self.encode(features, tokens, positions)
        for slots, span, (keys, values) in zip(context.layers, self.spans, encoded.layers, strict=True):
            keys, values, at = keys.transpose(1, 2), values.transpose(1, 2), positions
            if span.window is not None:
                newest = _newest(positions, lengths, slots.capacity)
                keys, values = (x[torch.arange(len(x), device=x.device)[:, None], newest] for x in (keys, values))
                at = positions.gather(1, newest) % slots.capacity
            slots.write(rows[:, None], at, keys, values)

    def select(self, context: Context, rows: Rows, length: int) -> FeatureContext:
        if isinstance(context, FeatureContext):
            layers = [(keys[rows, :, :length], values[rows, :, :length]) for keys, values in context.layers]
            return FeatureContext(layers, context.window)
        assert isinstance(context, FeatureSlots)
        pairs = zip(self.spans, context.layers, strict=True)
        layers = [s.read(rows, length if span.window is None else s.capacity) for span, s in pairs]
        return FeatureContext(layers, rings=True)

    def move_row(self, context: Context, source: int, to: int) -> None:
        assert isinstance(context, FeatureSlots)
        for slots in context.layers:
            slots.move_row(source, to)


def _newest(positions: torch.Tensor, lengths: torch.Tensor | None, count: int) -> torch.Tensor:
    """Return columns [n, at most count] of positions [n, T]: the last ones before each row's end.

    lengths: [n] columns up to each end; None: all.
    """
    n, T = positions.shape
    ends = positions.new_full((n,), T) if lengths is None else lengths
    first = (ends - count).clamp(min=0)
    return first[:, None] + torch.arange(min(count, T), device=positions.device)
