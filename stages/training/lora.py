"""Trains a low-rank adapter of a drafter in place of its weights, with peft.

A map W x becomes W x + B A x: the scale is 1 (peft's `lora_alpha` is the rank), so that only the learning rate sets
how far a step moves. B starts at zero, so the drafter proposes as before. The adapter has the linear maps of attention
and MLP, of `fc`, and of the kernels of DFlash2's convolutions. The rest is not adapted: norms, EAGLE-3's head, DSpark's
Markov head and confidence head, DFlash2's selector. Most of these have a row for each token, of which a refresh sees
few, and their adapters would be larger than those of all other maps. Of a native head, router and experts are not
adapted, but for shared experts.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraModel
from torch import nn

from draftsmith.stages.drafters.base import Drafter
from draftsmith.stages.drafters.checkpoint_format import cast
from draftsmith.stages.training.config import LoraOptions


class Adapter:
    """The adapter of a drafter, until it is merged into the drafter."""

    def __init__(self, drafter: Drafter, options: LoraOptions, compute_dtype: str, seed: int):
        """Add an adapter with seeded random A, float32; after that no other weight has a gradient.

        A map's weights are kept in the compute dtype if that loses nothing: autocast would copy them at every use.
        """
        self.rank = drafter.adapter_rank = options.rank
        self._drafter = drafter.requires_grad_(False)
        self._maps, dtype = drafter.linear_maps(), getattr(torch, compute_dtype)
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(self._maps))
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            plain = nn.Module()  # without a config, by which peft would adapt all experts in place of shared ones
            plain._modules = drafter._modules
            self._lora = LoraModel(plain, config, "default")
        for name, linear in self._maps.items():
            adapted: Any = drafter.get_submodule(name)
            adapted.cast_input_dtype_enabled = False  # autocast casts
            if all(weight.to(dtype).float().equal(weight) for weight in linear.parameters()):
                cast(linear, dtype)

    def merge(self) -> None:
        """Add B A to the drafter's weights, which become float32, and remove the adapter."""
        for linear in self._maps.values():
            cast(linear, torch.float32)
        self._lora.merge_and_unload()
        self._drafter.adapter_rank = None
