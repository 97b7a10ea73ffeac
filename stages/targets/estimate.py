"""Sizes of target and drafter, in bytes, from their configs alone: what `draftsmith check` compares with the machine.

GB are 10^9 bytes. Weights are counted on torch's meta device: exact for every architecture, and nothing is allocated.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a config that memory depends on."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    @classmethod
    def of(cls, config: Any, parameters: int) -> ModelSize:
        heads = config.num_attention_heads
        return cls(
            parameters=parameters,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocabulary=config.vocab_size,
        )

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """2 · layers · kv_heads · head_dim · itemsize: keys and values of one position."""
        return 2 * self.layers * self.kv_heads * self.head_dim * itemsize


def target_size(folder: Path) -> ModelSize:
    """Of the model whose config.json lies in `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return ModelSize.of(config.get_text_config(), sum(p.numel() for p in model.parameters()))  # tied ones once
