"""A cached forward of an ordinary decoder from only its operators, bit for bit equal to the decoder's own code.

While decoding, the code of transformers around the operators takes about as long as reading a small model's weights.
Families whose layers are the same few operators are computed here, from the model's own modules; others run unchanged.
`check_agreement` compares both whenever a target is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from draftsmith.stages.targets.attention import fold, folded_attention
from draftsmith.stages.targets.kv_cache import SlotCache
from draftsmith.stages.targets.packed_linear import PackedLinear, PackedSlice

Map = Callable[[torch.Tensor], torch.Tensor]

# transformers' families of pre-norm layers with rotary attention and a gated MLP, with or without query and key norms.
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")
_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
_NORMS = {"q_norm", "k_norm"}
_MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
_SPREAD = 512  # tokens up to which rotations are expanded to every head: broadcasting is slower for few


@dataclass(frozen=True)
class _Layer:
    qkv: Map  # queries, keys and values side by side
    o: Map
    gate_up: Callable[[torch.Tensor], Sequence[torch.Tensor]]
    down: Map
    before_attention: Map
    before_mlp: Map
    head_norms: Map | None  # of queries and keys, [N, heads + kv_heads, D]


class FastDecoder:
    """The forward of `Target.step`, with the parameters at the time of construction."""

    def __init__(self, decoder: Any, kinds: Sequence[str]):
        """Take the modules of a decoder. kinds: the kind of each layer, which is the key of its mask."""
        config = decoder.config
        self.heads, self.kv_heads = config.num_attention_heads, config.num_key_value_heads
        first = decoder.layers[0].self_attn
        self.head_dim, self.scaling = first.head_dim, first.scaling
        self.embed, self.rotary, self.kinds = decoder.embed_tokens, decoder.rotary_emb, list(kinds)
        self.layers = [_layer(layer, self.heads, self.kv_heads) for layer in decoder.layers]
        self.norm = _norm(decoder.norm)

    @classmethod
    def for_decoder(cls, decoder: Any, kinds: Sequence[str]) -> FastDecoder | None:
        """Return the fast forward of a decoder; None for an unknown family."""
        return cls(decoder, kinds) if _is_ordinary(decoder) else None

    def __call__(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        masks: torch.Tensor | dict[str, torch.Tensor | None],
        cache: SlotCache,
        layer_ids: Sequence[int],
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return hidden states [n, T, H] after the final norm, and those after layers `layer_ids` side by side.

        ids, positions: [n, T]. masks: those of `Layers.masks`. cache: its address is set.
        """
        n, T = ids.shape
        N, all_heads, D = n * T, self.heads + self.kv_heads, self.head_dim
        x = self.embed(ids).view(N, -1)
        cos, sin = self._rotations(x, positions)
        groups = self.heads // self.kv_heads
        folded = {kind: fold(mask, groups) for kind, mask in _by_kind(masks, self.kinds).items()}
        captured: dict[int, torch.Tensor] = {}
        for index, (layer, kind) in enumerate(zip(self.layers, self.kinds, strict=True)):
            qkv = layer.qkv(layer.before_attention(x)).view(N, -1, D)
            both, values = qkv[:, :all_heads], qkv[:, all_heads:]
            if layer.head_norms is not None:
                both = layer.head_norms(both)
            both = (both * cos).add_(both.roll(D // 2, -1).mul_(sin)).view(n, T, all_heads, D)
            keys, values = cache.store(index, both[:, :, self.heads :], values.view(n, T, self.kv_heads, D))
            queries = both[:, :, : self.heads].transpose(1, 2)
            attended = folded_attention(queries, keys, values, folded[kind], self.scaling)
            x = layer.o(attended.reshape(N, -1)).add_(x)
            gate, up = layer.gate_up(layer.before_mlp(x))
            x = layer.down(F.silu(gate).mul_(up)).add_(x)
            if index in layer_ids:
                captured[index] = x
        features = torch.cat([captured[layer] for layer in layer_ids], -1).view(n, T, -1) if layer_ids else None
        return self.norm(x).view(n, T, -1), features

    def _rotations(self, x: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return factors [N, heads, D] of a vector, and of it with its halves swapped (the first one negated)."""
        cos, sin = (factors.flatten(0, 1)[:, None] for factors in self.rotary(x, position_ids=positions))
        half = self.head_dim // 2
        sin = torch.cat((-sin[..., :half], sin[..., half:]), -1)
        if len(x) > _SPREAD:
            return cos, sin
        shape = (-1, self.heads + self.kv_heads, -1)
        return cos.expand(shape).contiguous(), sin.expand(shape).contiguous()


def _by_kind(masks: torch.Tensor | dict[str, torch.Tensor | None], kinds: Sequence[str]) -> dict[str, torch.Tensor]:
    by_kind = masks if isinstance(masks, dict) else dict.fromkeys(kinds, masks)
    return {kind: mask for kind, mask in by_kind.items() if mask is not None}


def _layer(layer: Any, heads: int, kv_heads: int) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        _side_by_side(attention.q_proj, attention.k_proj, attention.v_proj),
        _map(attention.o_proj),
        _both(mlp.gate_proj, mlp.up_proj),
        _map(mlp.down_proj),
        _norm(layer.input_layernorm),
        _norm(layer.post_attention_layernorm),
        _norm_of_heads(attention, heads, kv_heads) if hasattr(attention, "q_norm") else None,
    )


def _side_by_side(*modules: nn.Module) -> Map:
    """Return a map to the products of all modules in one tensor."""
    if isinstance(first := modules[0], PackedSlice):
        return first.whole.forward
    maps = [_map(module) for module in modules]
    return lambda x: torch.cat([linear(x) for linear in maps], -1)


def _both(gate: nn.Module, up: nn.Module) -> Callable[[torch.Tensor], Sequence[torch.Tensor]]:
    if isinstance(gate, PackedSlice):
        whole = gate.whole
        return lambda x: whole(x).chunk(2, -1)
    one, other = _map(gate), _map(up)
    return lambda x: (one(x), other(x))


def _map(module: nn.Module) -> Map:
    """Return a module's map, without the overhead of hooks for plain linear modules."""
    if type(module) is nn.Linear:
        return partial(F.linear, weight=module.weight, bias=module.bias)
    return module.forward if type(module) is PackedLinear else module


def _norm(module: Any) -> Map:
    return partial(_normalised, weight=module.weight, eps=module.variance_epsilon)


def _norm_of_heads(attention: Any, heads: int, kv_heads: int) -> Map:
    query_norm, key_norm = attention.q_norm, attention.k_norm
    weight = torch.cat([query_norm.weight.expand(heads, -1), key_norm.weight.expand(kv_heads, -1)])
    return partial(_normalised, weight=weight, eps=query_norm.variance_epsilon)


def _normalised(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """Return the RMS norm, rounded to the dtype of x before it is weighted, as in the models.

    weight: shaped like the last dimension or the last two.
    """
    return F.rms_norm(x, x.shape[-1:], None, eps).mul_(weight)


def _is_ordinary(decoder: Any) -> bool:
    """Return whether a decoder is a known one, by class and children: another release may have more children."""
    if type(decoder).__name__ not in [f"{family}Model" for family in _FAMILIES]:
        return False
    children = {name for name, _ in decoder.named_children()}
    return (
        children == {"embed_tokens", "layers", "norm", "rotary_emb"}
        and decoder.config.hidden_act == "silu"
        and len({parameter.dtype for parameter in decoder.parameters()}) == 1
        and all(_is_ordinary_layer(layer) for layer in decoder.layers)
    )


def _is_ordinary_layer(layer: Any) -> bool:
    def children(module: nn.Module) -> set[str]:
        return {name for name, _ in module.named_children()}

    return (
        children(layer) == _PARTS
        and children(layer.self_attn) in (_PROJECTIONS, _PROJECTIONS | _NORMS)
        and children(layer.mlp) == _MLP
        and all(hasattr(layer.self_attn, name) for name in ("head_dim", "scaling"))
        and all(hasattr(norm, "variance_epsilon") for norm in (layer.input_layernorm, layer.post_attention_layernorm))
    )
