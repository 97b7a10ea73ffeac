"""The numbers of a text model's layers, where a config has them by layer."""

from __future__ import annotations

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


def wrong_sizes(config: Any, names: Iterable[str]) -> list[tuple[str, Any]]:
    """(field, value) of what a config says of a model, and none can have."""
    said = [(name, getattr(config, name, None)) for name in names]
    return [(name, size) for name, size in said if size is not None and not (type(size) is int and 0 < size <= _MOST)]
