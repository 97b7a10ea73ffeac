"""Sizes in a text model's config, where layers may differ, and checks that they are possible."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any


def layer_configs(text_config: Any) -> Sequence[Any]:
    """Return one config per layer if they differ (Gemma 4: heads and their width), else the config alone."""
    return text_config.per_layer_config if getattr(text_config, "is_heterogeneous", False) else [text_config]


def usual_layer(text_config: Any) -> Any:
    """Return the config with the usual heads and width: that of a sliding layer if layers differ."""
    configs = layer_configs(text_config)
    if len(configs) == 1:
        return configs[0]
    kinds = getattr(text_config, "layer_types", None) or []
    return configs[kinds.index("sliding_attention") if "sliding_attention" in kinds else 0]


_MAX_SIZE = 2**24  # far above any size of a model


def wrong_numbers(config: Any, sizes: Iterable[str]) -> list[tuple[str, Any]]:
    """Return (field, value) of the impossible numbers in a config. sizes: names of fields to check, if present."""
    rope = getattr(config, "rope_parameters", None) or {}
    by_kind = not {"rope_type", "rope_theta"} & rope.keys()
    rotations = {f"{kind}.": each for kind, each in rope.items() if isinstance(each, dict)} if by_kind else {"": rope}
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
    """Return whether a value is an integer that a size of a model may be."""
    return type(value) is int and 0 < value <= _MAX_SIZE


def _is_between(value: Any, most: float) -> bool:
    return type(value) in (int, float) and 0 < value < most
