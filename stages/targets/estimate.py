"""Sizes of target and drafter for memory estimates, from only the models' configs.

Letters of the formulas, here and in `flows/checks/memory.py`: P, P_d parameters of target and drafter, s bytes of an
element in the serving dtype, T positions of the longest sequence (prompt limit + new tokens), H hidden size, K target
layers that the drafter reads, B sequences per step, V vocabulary (or the reduced head). Estimates should be right
within a third where memory decides; activations of the target's forwards are small compared with the listed terms.
Weights are counted on torch's meta device: exact for every architecture, and nothing is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Python with a CPU build of torch and transformers imported. Not measured on a machine with a GPU, where it stands for
# the context in the GPU's memory too; a CUDA build took 750 MB on a machine without one.
PROCESS_BYTES = 600e6


@dataclass(frozen=True)
class ModelSize:
    """The sizes in a config that memory depends on."""

    parameters: int
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    entry: int  # numbers in a layer's cache of one position: its keys and values, or the latent that they come from
    entry_heads: int  # heads that they belong to; 1 for a latent
    vocabulary: int
    windows: tuple[int, ...] = ()  # positions in the window of every sliding layer
    divided: int = 0  # parameters that are divided among ranks that share the model
    mapped: int = 0  # of a drafter: parameters of its linear maps, which an adapter adapts
    map_widths: int = 0  # inputs and outputs of these maps together: an adapter has rank times as many parameters
    active: int = 0  # width of the experts that one token goes through; 0: no experts

    @classmethod
    def from_config(
        cls, config: Any, parameters: int, divided: int = 0, map_sizes: tuple[int, int] = (0, 0)
    ) -> ModelSize:
        """Return the sizes in a text model's config. divided: see the field. map_sizes: a drafter's."""
        from draftsmith.stages.targets.layers import usual_layer  # imports torch, and planning imports this module

        usual = usual_layer(config)
        heads = usual.num_attention_heads
        kv_heads = getattr(usual, "num_key_value_heads", None) or heads
        head_dim = getattr(usual, "head_dim", None) or config.hidden_size // heads
        if latent := getattr(usual, "kv_lora_rank", None):  # MLA
            entry, entry_heads = latent + usual.qk_rope_head_dim + (getattr(usual, "index_head_dim", None) or 0), 1
        else:
            entry, entry_heads = 2 * kv_heads * head_dim, kv_heads
        sliding = [kind for kind in getattr(config, "layer_types", None) or () if kind == "sliding_attention"]
        window = getattr(usual, "sliding_window", None)
        return cls(
            parameters=parameters,
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=getattr(usual, "intermediate_size", None) or 4 * config.hidden_size,
            heads=heads,
            kv_heads=kv_heads,
            head_dim=head_dim,
            entry=entry,
            entry_heads=entry_heads,
            vocabulary=getattr(config, "draft_vocab_size", None) or config.vocab_size,
            windows=(window,) * len(sliding) if window else (),
            divided=divided,
            mapped=map_sizes[0],
            map_widths=map_sizes[1],
            active=_active_width(usual),
        )

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Return layers · entry · itemsize, the cache of one position."""
        return self.layers * self.entry * itemsize


@dataclass(frozen=True)
class Sizes:
    """The sizes of a run's target and drafter, and of its requests."""

    target: ModelSize
    drafter: ModelSize
    features: int  # K
    block_size: int
    itemsize: int  # s
    longest_prompt: int
    positions: int  # the target's context
    kind: str  # of the drafter
    deepest: int  # target layers that run for the features that the drafter reads
    operations: Callable[..., float]  # `Drafter.operations`
    device_memory: float = math.inf  # bytes of the device that trains: a step is split until it fits
    accelerated: bool = False  # each process has such a device; otherwise they share the machine's memory

    @property
    def feature_bytes(self) -> int:
        """Return (K + 1) · H · s of one position: the layers that the drafter reads, and the last hidden state."""
        return (self.features + 1) * self.target.hidden * self.itemsize

    def weights(self, model: ModelSize, itemsize: int | None = None, sharing: int = 1) -> float:
        """Return P · s in bytes, in the serving dtype unless given; for a model shared by ranks, the slice of one."""
        parameters = model.parameters - model.divided * (1 - 1 / sharing)
        return parameters * (itemsize or self.itemsize)

    def reduced_head(self, tokens: int | None) -> tuple[int, float]:
        """Return the rows of the head, and the bytes of its copy (none for the whole vocabulary)."""
        if tokens is None or tokens >= self.target.vocabulary:
            return self.target.vocabulary, 0.0
        return tokens, float(tokens * self.target.hidden * self.itemsize)


@dataclass(frozen=True)
class AnswerCounts:
    """The number and length of the answers that a stage reads or writes, as far as its config says."""

    longest: int  # T
    count: float = math.inf  # at most
    verify_steps: float = 0.0  # in all, about


@dataclass(frozen=True)
class StageUse:
    """The models and inputs of a stage in one node."""

    sizes: Sizes
    prompts: Mapping[str, int] = field(default_factory=dict)  # split -> number of prompts, in the order of their rows
    drafters: int = 0  # among the inputs
    answers: AnswerCounts | None = None  # the trajectories that it reads

    @property
    def longest(self) -> int:
        """Return T of the answers that it reads, by default the target's context."""
        return self.answers.longest if self.answers is not None else self.sizes.positions


def _active_width(config: Any) -> int:
    """Return the width of the experts that one token goes through; 0 without experts."""
    experts: int = getattr(config, "num_experts_per_tok", None) or 0
    width: int = getattr(config, "moe_intermediate_size", None) or config.intermediate_size if experts else 0
    shared: int = getattr(config, "shared_expert_intermediate_size", None) or 0
    shared = shared or width * (getattr(config, "n_shared_experts", None) or 0)
    return experts * width + shared


def target_size(folder: Path) -> ModelSize:
    """Return the size of the model whose config.json is in `folder`."""
    from draftsmith.stages.targets.loading import divided_parameters, model_without_weights  # imports torch

    model = model_without_weights(folder)
    parameters = sum(p.numel() for p in model.parameters())  # tied ones once
    return ModelSize.from_config(model.config.get_text_config(), parameters, divided_parameters(model))
