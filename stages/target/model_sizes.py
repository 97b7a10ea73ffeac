"""The numbers of a text model's layers, where a config has them by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def layer_configs(text_config: Any) -> Sequence[Any]:
    """One config for each layer where these differ (Gemma 4: heads and their width), else the config alone."""
    return text_config.per_layer_config if getattr(text_config, "is_heterogeneous", False) else [text_config]


def usual_layer(text_config: Any) -> Any:
    """The config to read heads and their width from: where layers differ, of one that slides."""
    configs = layer_configs(text_config)
    if len(configs) == 1:
        return configs[0]
    kinds = getattr(text_config, "layer_types", None) or []
    return configs[kinds.index("sliding_attention") if "sliding_attention" in kinds else 0]


_MOST = 2**24  # what no size of a model comes near


def wrong_numbers(config: Any, sizes: Iterable[str]) -> list[tuple[str, Any]]:
    """(field, value) of what a config says of a model, and none can have. sizes: fields to look at too, if they are
    there."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = not {"rope_type", "rope_theta"} & rope.keys()
    rotations = {f"{kind}.": part for kind, part in rope.items() if isinstance(part, dict)} if by_kind else {"": rope}
    angles = {
        f"rope_parameters.{kind}{name}": part.get(name)
        for kind, part in rotations.items()
        for name in ("rope_theta", "factor", "original_max_position_embeddings")
    }
    eps = {"rms_norm_eps": getattr(config, "rms_norm_eps", None)}
    return [
        *((name, size) for name in sizes if (size := getattr(config, name, None)) is not None and not is_size(size)),
        *((name, value) for name, value in angles.items() if value is not None and not _is_between(value, math.inf)),
        *((name, value) for name, value in eps.items() if value is not None and not _is_between(value, 1)),
    ]


def is_size(value: Any) -> bool:
    """An integer that a size of a model may be."""
    return type(value) is int and 0 < value <= _MOST


def _is_between(value: Any, most: float) -> bool:
    return type(value) in (int, float) and 0 < value < most
