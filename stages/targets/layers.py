"""The layers of a target: kinds (transformers'), sizes, attention masks, and what follows for caches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DeepseekV3Config, Qwen2Config
from transformers.cache_utils import (
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionCacheLayerMixin,
    get_layer_types_and_kwargs,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from draftsmith.stages.targets.attention import causal_mask

CHOOSING = "indexed_attention"  # attention that chooses its entries by the scores of an indexer, which has its own keys

# The config field with the number of positions that attention of a kind reads; None: the whole prefix.
_REACH = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "hybrid": None,  # attention, and a state next to it
    "hybrid_sliding": "sliding_window",
    CHOOSING: None,
}
_SLIDING = ("sliding_attention", "hybrid_sliding")


# transformers' name for a layer without its own cache: only an MLP or experts, or a layer that reads another's cache
_NO_CACHE = "dummy"


class _KimiK2Config(DeepseekV3Config):
    """Kimi K2 is a DeepSeek-V3. Transformers knows the name only inside Kimi K2.5."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return DeepseekV3Config.from_dict(config_dict | {"model_type": DeepseekV3Config.model_type}, **kwargs)


class _MiMoConfig(Qwen2Config):
    """A MiMo is a Qwen2 with a head for multi-token prediction. Transformers does not know the name."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return Qwen2Config.from_dict(config_dict | {"model_type": Qwen2Config.model_type}, **kwargs)


CONFIG_MAPPING.register("kimi_k2", _KimiK2Config, exist_ok=True)
CONFIG_MAPPING.register("mimo", _MiMoConfig, exist_ok=True)


class UnknownLayersError(ValueError):
    """Layers whose cache is neither keys and values of each position nor a recurrent state."""


@dataclass(frozen=True)
class Layers:
    """The kinds of a model's layers, in order."""

    kinds: tuple[str, ...]  # of transformers' `layer_types`
    reach: tuple[int | None, ...]  # positions that a layer's attention reads, its own included; None: all
    # Some layer has a state in place of entries. Entries can be masked, so a cache of them can drop its last positions,
    # and one forward can follow several continuations; a state can neither be rewound nor masked.
    recurrent: bool

    @classmethod
    def from_config(cls, text_config: Any) -> Layers:
        """Return the layers of a text model's config. Raises UnknownLayersError."""
        both_ways = getattr(text_config, "use_bidirectional_attention", None)  # "vision": only within an image
        if both_ways not in (None, False, "vision") or not getattr(text_config, "is_causal", True):
            raise UnknownLayersError("attention in both directions")
        if getattr(text_config, "altup_num_inputs", 1) > 1:  # Gemma 3n
            raise UnknownLayersError("several vectors per token")
        kinds, _ = get_layer_types_and_kwargs(text_config)  # windows: its second value is of another type before 5.19
        entries, recurrent = (DynamicLayer, DynamicSlidingWindowLayer, DynamicIndexedLayer), False
        try:
            cache = DynamicCache(config=text_config)
        except KeyError as unknown:  # a kind that transformers knows only inside one model's code
            raise UnknownLayersError(unknown.args[0]) from None
        for kind, layer in zip(kinds, cache.layers, strict=True):
            holds_state = isinstance(layer, LinearAttentionCacheLayerMixin)
            recurrent = recurrent or holds_state
            if not (holds_state or kind == _NO_CACHE or (type(layer) in entries and kind in _REACH)):
                raise UnknownLayersError(kind)
        usual = usual_layer(text_config)
        reach = {kind: getattr(usual, field) if (field := _REACH.get(kind)) else None for kind in kinds}
        if invalid := [kind for kind, window in reach.items() if window is not None and window < 1]:
            raise UnknownLayersError(f"{invalid[0]} over {reach[invalid[0]]} positions")
        if _NO_CACHE in kinds:  # a layer that reads another's entries reads as far as that one
            types = text_config.layer_types
            kinds = [other if kind == _NO_CACHE else kind for kind, other in zip(kinds, types, strict=True)]
        return cls(tuple(kinds), tuple(map(reach.get, kinds)), recurrent)

    def masks(
        self,
        visible: torch.Tensor | None,
        positions: torch.Tensor,
        entry_positions: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor | dict[str, torch.Tensor | None]:
        """Return additive masks [n, 1, T, L] as decoders take them: one, or one for each kind of layer.

        visible: bool [n, T, L]; None: a token sees every entry up to its position. positions: [n, T] of the tokens;
        entry_positions: [n, L] of the entries. If the tokens are all entries, and no window is shorter, the mask is
        `causal_mask`, unless an indexer reads it.
        """
        masks: dict[str, torch.Tensor | None] = {}
        T, L = positions.shape[1], entry_positions.shape[1]
        first = visible is None and T == L and CHOOSING not in self.kinds  # tokens of their rows, without an indexer
        whole = visible
        for kind, reach in dict(zip(self.kinds, self.reach, strict=True)).items():
            if kind not in _REACH:
                masks[kind] = None
                continue
            if first and (reach is None or reach >= T):
                masks[kind] = causal_mask(positions.device)
                continue
            if whole is None:
                whole = entry_positions[:, None] <= positions[..., None]
            seen = whole
            if kind in _SLIDING and reach is not None:
                seen = seen & (positions[..., None] - entry_positions[:, None] < reach)
            elif kind == "chunked_attention" and reach is not None:
                seen = seen & (positions[..., None] // reach == entry_positions[:, None] // reach)
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            masks[kind] = mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
        attending = [mask for mask in masks.values() if mask is not None]
        return attending[0] if len(attending) == 1 else masks


def layer_configs(text_config: Any) -> Sequence[Any]:
    """Return one config per layer if they differ (Gemma 4: heads and their width), else only the config."""
    return text_config.per_layer_config if getattr(text_config, "is_heterogeneous", False) else [text_config]


def usual_layer(text_config: Any) -> Any:
    """Return the config with the usual heads and width: a sliding layer's config if layers differ."""
    configs = layer_configs(text_config)
    if len(configs) == 1:
        return configs[0]
    kinds = getattr(text_config, "layer_types", None) or []
    return configs[kinds.index("sliding_attention") if "sliding_attention" in kinds else 0]


def stable_positions(text_config: Any) -> int | None:
    """Return the number of positions in which rotations and scales do not depend on the text's length; None: all.

    With `longrope` and `dynamic` transformers chooses the angles of all tokens by the furthest position of a forward:
    beyond the limit, entries of a cache are rotated by other angles than the tokens that read them. Llama 4 scales
    queries by the length of the cache, from `floor_scale` on.
    """
    rope = getattr(text_config, "rope_parameters", None) or {}
    parts = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    limits = {
        "longrope": lambda part: part["original_max_position_embeddings"],
        "dynamic": lambda _part: text_config.max_position_embeddings,
    }
    positions = [int(limits[part["rope_type"]](part)) for part in parts if part.get("rope_type") in limits]
    if getattr(text_config, "attn_temperature_tuning", False):
        positions.append(int(text_config.floor_scale) - 1)
    return min(positions) if positions else None


_MAX_SIZE = 2**24  # far above any size of a model


def wrong_numbers(config: Any, sizes: Iterable[str]) -> list[tuple[str, Any]]:
    """Return (field, value) of the impossible numbers in a config. sizes: names of fields to check, if present."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = not {"rope_type", "rope_theta"} & rope.keys()
    rotations = {f"{kind}.": part for kind, part in rope.items() if isinstance(part, dict)} if by_kind else {"": rope}
    angles = {
        f"rope_parameters.{kind}{name}": rotation.get(name)
        for kind, rotation in rotations.items()
        for name in ("rope_theta", "factor", "original_max_position_embeddings")
    }
    eps = {"rms_norm_eps": getattr(config, "rms_norm_eps", None)}
    return [
        *((name, size) for name in sizes if (size := getattr(config, name, None)) is not None and not is_size(size)),
        *((name, value) for name, value in angles.items() if value is not None and not _is_between(value, math.inf)),
        *((name, value) for name, value in eps.items() if value is not None and not _is_between(value, 1)),
    ]


def is_size(value: Any) -> bool:
    """Return whether a value is an integer that can be a size of a model."""
    return type(value) is int and 0 < value <= _MAX_SIZE


def _is_between(value: Any, most: float) -> bool:
    return type(value) in (int, float) and 0 < value < most
