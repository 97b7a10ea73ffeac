"""The numbers of a text model's layers, where a config has them by layer."""

from __future__ import annotations

from collections.abc import Sequence
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
