"""What can be done with a target: told by the kinds of its layers, as those of the cache that transformers makes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# How far back attention of a kind reads, as the name of a config field; None: over the whole prefix.
_REACH = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
    "hybrid": None,  # attention, and a state beside it
    "hybrid_sliding": "sliding_window",
}
_SLIDING = ("sliding_attention", "hybrid_sliding")


# transformers' word for a layer without a cache: an MLP or experts alone, or one that is handed an earlier one's
_NOTHING = "dummy"


class UnknownLayersError(ValueError):
    """Layers whose cache is neither keys and values of each position nor a state that a forward leaves behind."""


@dataclass(frozen=True)
class Layers:
    """The kinds of a model's layers, in order, and what follows from them."""

    kinds: tuple[str, ...]  # of transformers' `layer_types`
    reach: tuple[int | None, ...]  # positions that a layer's attention reads, its own included; None: all
    # Does any layer keep a state in place of entries? Entries are masked out, so a cache of them can forget its last
    # positions, and one forward can follow several continuations; a state can neither be taken back nor masked.
    recurrent: bool

    @classmethod
    def of(cls, text_config: Any) -> Layers:
        """Raises UnknownLayersError."""
        from transformers.cache_utils import (
            DynamicCache,
            DynamicLayer,
            DynamicSlidingWindowLayer,
            LinearAttentionCacheLayerMixin,
            get_layer_types_and_kwargs,
        )

        both_ways = getattr(text_config, "use_bidirectional_attention", None)  # "vision": within an image alone
        if both_ways not in (None, False, "vision") or not getattr(text_config, "is_causal", True):
            raise UnknownLayersError("attention in both directions")
        if getattr(text_config, "altup_num_inputs", 1) > 1:  # Gemma 3n
            raise UnknownLayersError("several vectors a token")
        kinds, settings = get_layer_types_and_kwargs(text_config)
        entries, recurrent = (DynamicLayer, DynamicSlidingWindowLayer), False
        for kind, layer in zip(kinds, DynamicCache(config=text_config).layers, strict=True):
            holds_state = isinstance(layer, LinearAttentionCacheLayerMixin)
            recurrent = recurrent or holds_state
            if not (holds_state or kind == _NOTHING or (type(layer) in entries and kind in _REACH)):
                raise UnknownLayersError(kind)
        reach = {kind: each.get("sliding_window") for kind, each in zip(kinds, settings, strict=True)}
        if senseless := [kind for kind, window in reach.items() if window is not None and window < 1]:
            raise UnknownLayersError(f"{senseless[0]} over {reach[senseless[0]]} positions")
        if _NOTHING in kinds:  # one that is handed entries reads as far as those that keep them
            kinds = [
                own if kind == _NOTHING else kind for kind, own in zip(kinds, text_config.layer_types, strict=True)
            ]
        return cls(tuple(kinds), tuple(map(reach.get, kinds)), recurrent)

    def masks(
        self, visible: torch.Tensor, positions: torch.Tensor, entry_positions: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor | dict[str, torch.Tensor | None]:
        """Additive masks [n, 1, T, L] as decoders take them: one, or one for each kind of layer.

        visible: bool [n, T, L]; positions: [n, T] of the tokens; entry_positions: [n, L] of the entries.
        """
        found: dict[str, torch.Tensor | None] = {}
        for kind, reach in dict(zip(self.kinds, self.reach, strict=True)).items():
            if kind not in _REACH:
                found[kind] = None
                continue
            seen = visible
            if kind in _SLIDING and reach is not None:
                seen = visible & (positions[..., None] - entry_positions[:, None] < reach)
            elif kind == "chunked_attention" and reach is not None:
                seen = visible & (positions[..., None] // reach == entry_positions[:, None] // reach)
            mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
            found[kind] = mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
        attending = [mask for mask in found.values() if mask is not None]
        return attending[0] if len(attending) == 1 else found


def steady_positions(text_config: Any) -> int | None:
    """Positions within which what a token computes of its own does not depend on the other tokens' ones; None: all.

    With `longrope` and `dynamic` transformers chooses the angles of all tokens by the furthest position of a forward:
    beyond, entries of a cache are turned by other angles than the tokens that read them. Llama 4 scales queries by how
    full the cache is, from `floor_scale` on.
    """
    rope = getattr(text_config, "rope_parameters", None) or {}
    each = [rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)]
    limits = {
        "longrope": lambda part: part["original_max_position_embeddings"],
        "dynamic": lambda _part: text_config.max_position_embeddings,
    }
    found = [int(limits[part["rope_type"]](part)) for part in each if part.get("rope_type") in limits]
    if getattr(text_config, "attn_temperature_tuning", False):
        found.append(int(text_config.floor_scale) - 1)
    return min(found) if found else None


def model_class(config: Any) -> Any:
    """The auto class of transformers that loads the causal LM of a checkpoint: of one with images, its text part's."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    known = type(config) in AutoModelForCausalLM._model_mapping
    return AutoModelForCausalLM if known else AutoModelForImageTextToText


def weightless_model(folder: Path) -> Any:
    """Build the model whose config.json lies in `folder` on torch's meta device: shapes without memory."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return model_class(config).from_config(config)


def causal_lm_of(model: Any) -> Any:
    """The causal LM of a model that was loaded by `model_class`: some hold one whole, and have no head of their own."""
    return model if model.get_output_embeddings() is not None else getattr(model, "language_model", model)


def decoder_of(model: Any) -> Any:
    """The part of a causal LM that makes hidden states of text."""
    decoder = model.get_decoder()
    return model.model if decoder is model else decoder  # Llama 4 names its decoder otherwise than its class says
